"""Slurm's host lists, read and written in Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.errors import UserError
from bigtrain_launch.hostlist import LARGEST, expand, fold


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[9-10],gpu-a[001-003,7]", ["n9", "n10", "gpu-a001", "gpu-a002", "gpu-a003", "gpu-a7"]),
        ("n10,n9", ["n10", "n9"]),
        ("rack[1-2]_blade[08-09]", ["rack1_blade08", "rack1_blade09", "rack2_blade08", "rack2_blade09"]),
        ("r[1-2][3-4]", ["r13", "r14", "r23", "r24"]),
        ("n[1-2]-ib.cluster.org", ["n1-ib.cluster.org", "n2-ib.cluster.org"]),
        ("[1-3]", ["1", "2", "3"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("a,a", ["a", "a"]),
    ],
)
def test_expand(text, hosts):
    assert expand(text) == hosts


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([], ""),
        (["n9", "n10"], "n[9-10]"),
        (["n10", "n9"], "n[10,9]"),
        (["n09", "n10", "n1"], "n[09-10,1]"),
        (["n099", "n100", "n0101"], "n[099-100,0101]"),
        (["login", "n1", "n2", "m3", "n3"], "login,n[1-2],m3,n3"),
        (["n1.org", "n2.org"], "n1.org,n2.org"),
        (["login", "login1"], "login,login1"),
        (["1", "2"], "[1-2]"),
        ([f"gpu{n:04}" for n in range(1, 1025)], "gpu[0001-1024]"),
    ],
)
def test_fold(hosts, text):
    assert fold(hosts) == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expected a host at its end"),
        ("n1,", "expected a host at its end"),
        (",n1", "expected a host at ',n1'"),
        ("n1,,n2", "expected a host at ',n2'"),
        ("n1 n2", "expected a comma at ' n2'"),
        ("n[1-2", "expected a comma at '[1-2'"),
        ("n1-2]", "expected a comma at ']'"),
        ("n[1-[2-3]]", "expected a comma at"),
        ("n[]", "expected numbers and ranges in '[]'"),
        ("n[a]", "expected a comma at '[a]'"),
        ("n[1-2-3]", "expected numbers and ranges in '[1-2-3]'"),
        ("n[1-]", "expected numbers and ranges"),
        ("n[3-1]", "the range 3-1 runs backwards"),
        ("n[1-003]", "the range 1-003 changes its width"),
        ("n[0-99999999]", f"more than {LARGEST:,} hosts"),
        ("n[0-999][0-999][0-999]", f"more than {LARGEST:,} hosts"),
        ("n[1-9999999999999999999999]", "expected numbers and ranges"),
        ("(null)", "expected a host at '(null)'"),
        ("n1;rm -rf", "expected a comma at ';rm -rf'"),
        ("n\u0661", "expected a comma at"),
        ("x" * 200 + "!", "xxx...'"),
    ],
)
def test_garbage_is_refused_in_one_line(text, what):
    with pytest.raises(UserError) as error:
        expand(text)
    assert what in str(error.value) and "a list looks like n[9-10]" in str(error.value) and "\n" not in str(error.value)


host = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,6}[0-9]{0,25}", fullmatch=True)
numbered = st.builds("{}{:0{}}".format, st.sampled_from(["n", "gpu-a", ""]), st.integers(0, 130), st.integers(1, 4))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(host, numbered), min_size=1, max_size=40))
def test_what_is_folded_expands_to_the_same_hosts_in_the_same_order(hosts):
    assert expand(fold(hosts)) == hosts


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="n1209[]-,. ab(", max_size=30))
def test_any_text_is_a_list_or_a_user_error(text):
    try:
        hosts = expand(text)
    except UserError:
        return
    assert hosts and expand(fold(hosts)) == hosts
