import secrets
from itertools import combinations

import pytest
from shamir_mnemonic.wordlist import WORDLIST

from tokens.errors import KeyUnusable
from tokens.provisioning import shares

SECRET = bytes(range(32))


@pytest.mark.parametrize(("threshold", "count"), [(2, 2), (2, 3), (3, 5)])
def test_any_m_of_n(threshold: int, count: int) -> None:
    made = shares.split(SECRET, threshold, count)
    assert len(set(made)) == count
    for size in range(1, count + 1):
        for some in combinations(made, size):
            if size < threshold:
                with pytest.raises(KeyUnusable, match=f"{threshold} different shares are needed, and {size} are there"):
                    shares.combine(some)
            else:
                assert shares.combine(some) == SECRET


def test_the_same_share_twice_is_one() -> None:
    one, two, _ = shares.split(SECRET, 2, 3)
    with pytest.raises(KeyUnusable, match="2 different shares are needed, and 1 are there"):
        shares.combine([one, f"  {one}\n"])
    assert shares.combine([one, one, two]) == SECRET


def test_a_share_with_another_word() -> None:
    one, two = shares.split(SECRET, 2, 2)
    words = one.split()
    for at in (0, 4, 10, len(words) - 1):
        other = secrets.choice([word for word in WORDLIST if word != words[at]])
        tampered = " ".join([*words[:at], other, *words[at + 1 :]])
        with pytest.raises(KeyUnusable, match="The shares give no wrap key") as caught:
            shares.combine([tampered, two])
        assert not set(caught.value.message.replace("wrap key", "").split()) & set(words)


def test_shares_of_different_keys() -> None:
    one, _ = shares.split(SECRET, 2, 2)
    _, other = shares.split(bytes(32), 2, 2)
    with pytest.raises(KeyUnusable, match="of different keys"):
        shares.combine([one, other])


@pytest.mark.parametrize("text", ["", "no share at all", "academic " * 33])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(KeyUnusable):
        shares.combine([text, text])
