"""Lends keys to a tool that can only load a PKCS#11 module."""

from tokens.lending.objects import LentKey
from tokens.lending.openssl import Via, configuration, provider_uri_pem
from tokens.lending.server import Loan, LoanLimits

__all__ = ["LentKey", "Loan", "LoanLimits", "Via", "configuration", "provider_uri_pem"]
