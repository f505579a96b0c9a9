import subprocess
from datetime import UTC, datetime, timedelta, timezone

import pytest
from asn1crypto import core
from hypothesis import given
from hypothesis import strategies as st

from signers.formats import der

# X.690 and RFC 5652, worked by hand
KNOWN = [
    (der.integer(0), "020100"),
    (der.integer(127), "02017f"),
    (der.integer(128), "02020080"),
    (der.integer(-128), "020180"),
    (der.integer(-129), "0202ff7f"),
    (der.integer(1 << 159), "021500" + "80" + "00" * 19),
    (der.oid("1.2.840.113549.1.7.2"), "06092a864886f70d010702"),
    (der.oid("2.999.3"), "0603883703"),
    (der.octet_string(b""), "0400"),
    (der.NULL, "0500"),
    (der.sequence(der.integer(1), der.NULL), "30050201010500"),
    (der.set_of(der.octet_string(b"b"), der.octet_string(b"aa"), der.octet_string(b"a")), "310a0401610401620402 6161"),
    (der.explicit(0, der.integer(1)), "a003020101"),
    (der.implicit(0, der.set_of(der.integer(1))), "a003020101"),
    (der.implicit(2, der.octet_string(b"x")), "820178"),
    (der.time(datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)), "170d" + b"491231235959Z".hex()),
    (der.time(datetime(2050, 1, 1, tzinfo=UTC)), "180f" + b"20500101000000Z".hex()),
    (der.time(datetime(1949, 12, 31, tzinfo=UTC)), "180f" + b"19491231000000Z".hex()),
    (der.time(datetime(814, 1, 28, tzinfo=UTC)), "180f" + b"08140128000000Z".hex()),
    (der.time(datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))), "170d" + b"251231230000Z".hex()),
]


@pytest.mark.parametrize(("encoding", "expected"), KNOWN)
def test_known_answers(encoding, expected):
    assert encoding == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (127, "047f"),
        (128, "048180"),
        (255, "0481ff"),
        (256, "04820100"),
        (65535, "0482ffff"),
        (65536, "0483010000"),
        (1 << 24, "048401000000"),
    ],
)
def test_lengths(length, header):
    encoding = der.octet_string(bytes(length))
    assert encoding[:-length] == bytes.fromhex(header)
    assert core.OctetString.load(encoding, strict=True).native == bytes(length)


def test_openssl_reads_it():
    encoding = der.sequence(
        der.oid("1.2.840.113549.1.7.1"),
        der.integer(-129),
        der.explicit(0, der.octet_string(bytes(70000))),
        der.time(datetime(2026, 7, 1, tzinfo=UTC)),
        der.NULL,
    )
    seen = subprocess.run(
        ["openssl", "asn1parse", "-inform", "DER"], input=encoding, capture_output=True, check=True
    ).stdout.decode()
    for expected in (
        "OBJECT            :pkcs7-data",
        "INTEGER           :-81",
        "l=70000 prim",
        ":260701000000Z",
        "NULL",
    ):
        assert expected in seen


@given(st.integers(-(1 << 600), 1 << 600))
def test_integers_come_back(value):
    encoding = der.integer(value)
    assert core.Integer.load(encoding, strict=True).native == value
    assert encoding == core.Integer(value).dump()


@given(st.binary(max_size=70000))
def test_octets_come_back(value):
    assert core.OctetString.load(der.octet_string(value), strict=True).native == value


@given(st.tuples(st.integers(0, 2), st.integers(0, 39)), st.lists(st.integers(0, 1 << 70), max_size=8))
def test_oids_come_back(first, rest):
    dotted = ".".join(map(str, (*first, *rest)))
    encoding = der.oid(dotted)
    assert core.ObjectIdentifier.load(encoding, strict=True).dotted == dotted


@given(st.datetimes(datetime(1950, 1, 1), datetime(9999, 12, 31)))
def test_times_come_back(moment):
    encoding = der.time(moment.replace(tzinfo=UTC))
    type_ = core.UTCTime if moment.year < 2050 else core.GeneralizedTime
    assert type_.load(encoding, strict=True).native == moment.replace(tzinfo=UTC, microsecond=0)


@given(st.lists(st.binary(max_size=300)))
def test_sets_are_sorted_as_asn1crypto_sorts_them(values):
    class Octets(core.SetOf):
        _child_spec = core.OctetString

    assert der.set_of(*map(der.octet_string, values)) == Octets(values).dump()
