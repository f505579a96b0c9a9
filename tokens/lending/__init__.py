"""Lends keys to a tool that can only load a PKCS#11 module."""

from tokens.lending.objects import LentKey
from tokens.lending.server import Loan, LoanLimits

__all__ = ["LentKey", "Loan", "LoanLimits"]
