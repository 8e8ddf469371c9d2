"""Configs that somebody else made, and an environment that is odd."""

import pickle
from functools import partial

import pytest
from payloads import BILLION, CONFIG, Cases, Place

from bigtrain import configfile
from bigtrain.ranks import launched

cases = Cases()
case = cases.case


def test_the_place_itself_is_good(place):
    assert place.config().train.steps == 2


def test_the_bomb_works(place):
    pickle.loads(place.pickle)
    assert place.canary.exists()


def yaml_case(name: str, text: str, says: str) -> None:
    """The text appended to a good config."""

    def load(place: Place) -> None:
        place.config(text.replace("COMMAND", place.command))

    cases.add(name, load, says)


TAGS = {
    "apply": "run: !!python/object/apply:os.system ['COMMAND']",
    "new": "run: !!python/object/new:os.system ['COMMAND']",
    "object": "run: !!python/object:os.system {command: COMMAND}",
    "name": "run: !!python/name:os.system",
    "module": "run: !!python/module:os",
    "verbatim": "run: !<tag:yaml.org,2002:python/object/apply:os.system> ['COMMAND']",
    "exec": "run: {name: !!python/object/apply:exec ['import os; os.system(\"COMMAND\")']}",
    "custom": "run: !bomb {name: COMMAND}",
    "binary": "run: {name: !!binary aGVsbG8=}",
}
for name, text in TAGS.items():
    yaml_case(f"yaml_tag_{name}", text, r"changed.yaml:\d+: is not valid YAML: the tag .* is not supported; write a plain value")


@case("the tag .* is not supported")
def yaml_tag_by_a_directive(place):
    text = f"%TAG !b! tag:yaml.org,2002:python/object/apply:\n---\nmodel: !b!os.system ['{place.command}']\n"
    configfile.load(place.write("c.yaml", text))


@case("command line: train.steps: is not valid YAML: the tag .* is not supported")
def yaml_tag_in_an_override(place):
    configfile.load(place.folder / "c.yaml", [f"train.steps=!!python/object/apply:os.system ['{place.command}']"])


yaml_case("yaml_billion_laughs", BILLION, r"changed.yaml:6: is not valid YAML: aliases \(\*name\) are not supported")
yaml_case("yaml_alias_of_itself", "a: &a [*a]\n", "aliases")
yaml_case("yaml_merge_key", "a: &a {b: 1}\nrun: {<<: *a}\n", "aliases")
yaml_case("yaml_deep_nesting", "run: " + "[" * 100_000, "changed.yaml: is not valid YAML: nested too deeply")
yaml_case("yaml_deep_mapping", "run: " + "{a: " * 100_000, "changed.yaml: is not valid YAML: nested too deeply")
yaml_case("yaml_key_twice", "optimizer: {lr: 1}\n", "changed.yaml:5: optimizer: stands twice; the first is at .*changed.yaml:4")
yaml_case("yaml_null_bytes", "run: {name: 'a\0b'}\n", "changed.yaml: is not valid YAML: special characters are not allowed")
yaml_case("run_name_that_escapes", "run: {name: ../../etc}\n", r"changed.yaml:5: run.name: found '../../etc'; expected text of the form")
yaml_case("run_name_of_html", "run: {name: <script>}\n", "run.name: found '<script>'")
yaml_case("yaml_huge_file", "# " + "x" * (1 << 20), "changed.yaml: is larger than 1 MiB: no config")


@case(r"command line: train.steps: found '9+\.\.\.; expected a whole number of at least 1")
def number_of_6000_digits_in_an_override(place):
    configfile.load(place.folder / "c.yaml", ["train.steps=" + "9" * 6000])


@case("c.yaml: is not UTF-8 text")
def config_that_is_a_pickle(place):
    configfile.load(place.write("c.yaml", place.pickle))


@case("c.yaml: is a device or a pipe; name a .yaml file")
def config_that_is_a_fifo(place):
    configfile.load(place.fifo("c.yaml"))


@case("c.yaml: is a device or a pipe; name a .yaml file")
def config_that_is_a_device(place):
    configfile.load(place.link("c.yaml", "/dev/zero"))


@case("include: .*pipe.yaml: is a device or a pipe")
def include_of_a_fifo(place):
    place.fifo("pipe.yaml")
    configfile.load(place.write("c.yaml", "include: pipe.yaml\n" + CONFIG))


@case("config.yaml:1: include: the config of a run or checkpoint includes nothing; remove it")
def saved_config_that_includes(place):
    configfile.load_saved(place.write("runs/r/config.yaml", "include: /etc/passwd\n" + CONFIG))


# ---- The environment ----

ODD = {
    "rank_of_6000_digits": ({"RANK": "9" * 6000}, "RANK: expected a whole number from the launcher, found '9{40}'"),
    "rank_in_other_digits": ({"RANK": "١"}, "RANK: expected a whole number"),
    "rank_with_a_newline": ({"RANK": "0\n"}, "RANK: expected a whole number"),
    "negative_rank": ({"RANK": "-1"}, "RANK: expected a whole number"),
    "world_of_nobody": ({"WORLD_SIZE": "0"}, "RANK: 0 is not below WORLD_SIZE 0"),
    "port_of_text": ({"MASTER_PORT": "$(touch x)"}, "MASTER_PORT: expected a whole number"),
}
for name, (variables, says) in ODD.items():
    cases.add(name, partial(launched, {"RANK": "0", "WORLD_SIZE": "1", **variables}), says)


@case(None)
def odd_slurm_job(place):
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    for job in ("", "12_[3-4]", "x" * 5000, "9" * 6000):
        assert 20000 <= int(launched({**srun, "SLURM_JOB_ID": job})["MASTER_PORT"]) < 30000


@pytest.mark.parametrize("name", cases)
def test_payload(name, place, request):
    cases.attempt(name, place, request)
