"""Manifests for Kubernetes, held to golden files, to the API's schemas and models, and to lists of what its enums may be, which those
let pass. `python tests/launch/test_kubernetes.py` writes the golden files again."""

import copy
import re
import sys
from pathlib import Path

import pytest
import yaml

from bigtrain.configlaunch import Launch
from bigtrain.errors import BAD_NODE, DONE, RunError, UserError
from bigtrain_launch import jobs
from bigtrain_launch.kubernetes import Job, dump, host, object_name, render, submit
from bigtrain_launch.queues import KUBERNETES_ID

GOLDEN = Path(__file__).with_name("golden")
IMAGE = "registry.example.com:5000/team/bigtrain:0.4@sha256:" + "0123456789abcdef" * 4
SMALL = {"container": {"image": "bigtrain:1"}, "kubernetes": {"claim": "work"}}
LARGE = {
    "nodes": 1024,
    "gpus_per_node": 8,
    "grace": 299.5,
    "venv": "/opt/venv",
    "environment": {"NCCL_DEBUG": "INFO", "LEVEL": "1e3"},
    "container": {"image": IMAGE},
    "kubernetes": {
        "namespace": "research",
        "claim": "shared",
        "shared_memory": "64Gi",
        "cpu": "96",
        "memory": "900Gi",
        "workdir": "/mnt/work",
        "secrets": ["wandb", "hub"],
        "rdma": "rdma/hca_shared_devices_a",
        "node_selector": {"cloud.example.com/pool": "h100", "yes": "no"},
        "queue": "team-a",
    },
}
CONFIG = "run:\n  name: one\ntrain:\n  steps: 1e4\n"


def job(kind: str = "jobset", settings: dict = SMALL, run: str = "runs/one", config: str = CONFIG, **more) -> Job:
    settings = {"nodes": 2, **copy.deepcopy(settings), **more}
    settings["kubernetes"]["kind"] = kind
    return Job(Launch(**settings), object_name(Path(run).name, 1), run, 3, config)


CASES = {f"{kind}-{nodes}": (kind, settings) for kind in ("jobset", "trainjob") for nodes, settings in ((2, SMALL), (1024, LARGE))}


# ---- Golden files ----


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    assert dump(render(job(*CASES[case]))) == (GOLDEN / f"{case}.yaml").read_text(), f"run: python {Path(__file__).name}"


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_is_meant(case):
    manifests = render(job(*CASES[case]))
    assert list(yaml.safe_load_all(dump(manifests))) == manifests


# ---- Held to the API ----


def lost(model, manifest: dict) -> list[str]:
    """Fields of a manifest that the API's model does not know: it drops them in silence."""
    found = []

    def walk(there, back, place: str) -> None:
        if isinstance(there, dict):
            for key, value in there.items():
                if isinstance(back, dict) and key in back:
                    walk(value, back[key], f"{place}.{key}")
                else:
                    found.append(f"{place}.{key}")
        elif isinstance(there, list):
            assert isinstance(back, list) and len(back) == len(there), place
            for number, pair in enumerate(zip(there, back)):
                walk(*pair, f"{place}[{number}]")
        else:
            assert there == back, place

    walk(manifest, model.from_dict(copy.deepcopy(manifest)).to_dict(), manifest["kind"])
    return found


def models(manifests: list[dict]) -> dict:
    from kubeflow_trainer_api import models

    of = {"JobSet": "JobsetV1alpha2JobSet", "TrainJob": "TrainerV1alpha1TrainJob", "TrainingRuntime": "TrainerV1alpha1TrainingRuntime"}
    return {m["kind"]: (getattr(models, of[m["kind"]]), m) for m in manifests if m["kind"] in of}


@pytest.mark.parametrize("case", CASES)
def test_the_models_of_the_api_know_every_field(case):
    found = models(render(job(*CASES[case])))
    assert set(found) == ({"JobSet"} if case.startswith("jobset") else {"TrainJob", "TrainingRuntime"})
    for model, manifest in found.values():
        assert lost(model, manifest) == []
        assert model.from_dict(copy.deepcopy(manifest)).to_dict() == manifest


def test_a_field_that_the_api_does_not_know_is_found():
    ((model, manifest),) = models(render(job())).values()
    manifest["spec"]["failurePolicy"]["maxRestart"] = 1
    job_of(manifest)["spec"]["template"]["spec"]["container"] = []
    place = "JobSet.spec.replicatedJobs[0].template.spec.template.spec.container"
    assert lost(model, manifest) == ["JobSet.spec.failurePolicy.maxRestart", place]


def job_of(manifest: dict) -> dict:
    """The Job that JobSet makes of a manifest."""
    spec = manifest["spec"]["template"]["spec"] if manifest["kind"] == "TrainingRuntime" else manifest["spec"]
    (group,) = spec["replicatedJobs"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x", **group["template"].get("metadata", {})},
        **group["template"],
    }


def validate(manifest: dict, version: str) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("case", CASES)
def test_the_schemas_of_the_api_take_it(case, version):
    config, *others = render(job(*CASES[case]))
    validate(config, version)
    validate(job_of(others[0]), version)


@pytest.mark.parametrize("change", [{"completion": 3}, {"completions": "3"}, {"template": {"spec": {"containers": [{"nam": "x"}]}}}])
def test_what_the_schemas_do_not_take_is_found(change):
    from kubernetes_validate import ValidationError

    there = job_of(render(job())[1])
    with pytest.raises(ValidationError):
        validate({**there, "spec": {**there["spec"], **change}}, "1.37")


ENUMS = {
    "kind": {"ConfigMap", "JobSet", "TrainJob", "TrainingRuntime"},
    "restartPolicy": {"Never", "OnFailure", "Always"},
    "completionMode": {"Indexed", "NonIndexed"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "operator": {"In", "NotIn"},
    "medium": {"", "Memory", "HugePages"},
    "status": {"True", "False", "Unknown"},
    "type": {"DisruptionTarget", "PodScheduled", "Ready", "Initialized", "ContainersReady"},
    "onJobFailureReasons": {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"},
}
ACTIONS = {
    "podFailurePolicy": {"FailJob", "FailIndex", "Ignore", "Count"},
    "failurePolicy": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"},
}


def bad_enums(value, key: str = "", policy: str = "") -> list[str]:
    if isinstance(value, dict):
        return [bad for k, v in value.items() for bad in bad_enums(v, k, k if k in ACTIONS else policy)]
    if isinstance(value, list):
        return [bad for v in value for bad in bad_enums(v, key, policy)]
    allowed = ACTIONS[policy] if key == "action" else ENUMS.get(key)
    return [f"{key}: {value}"] if allowed is not None and value not in allowed else []


@pytest.mark.parametrize("case", CASES)
def test_enums(case):
    manifests = render(job(*CASES[case]))
    assert bad_enums(manifests) == []
    written = dump(manifests)
    for name in ("kind", "action", "restartPolicy", "completionMode", "podReplacementPolicy", "operator", "medium", "onJobFailureReasons"):
        assert f"{name}:" in written  # else this test would hold for nothing
    assert bad_enums(list(yaml.safe_load_all(written.replace("action: FailJob\n", "action: FailJobSet\n")))) == ["action: FailJobSet"]
    assert bad_enums(list(yaml.safe_load_all(written.replace("Memory", "memory")))) == ["medium: memory"]


# ---- What it says ----


def pod(manifests: list[dict]) -> dict:
    return job_of(manifests[1])["spec"]["template"]["spec"]


def test_ends_of_a_pod():
    """Who decides is the launcher, in the pod 0: it has started the ranks again as often as it may."""
    spec = job_of(render(job())[1])["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("FailJob", [1, 2, 76, 78]),
        ("Ignore", [75]),
        ("Ignore", None),
    ]
    assert not {DONE, BAD_NODE, 137, 143} & {code for rule in rules[:2] for code in rule["onExitCodes"]["values"]}  # all pods start again
    assert spec["backoffLimit"] == 0 and render(job())[1]["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_spares_are_pods_too():
    spec = job_of(render(job(spares=2))[1])["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    runtime, train = render(job("trainjob", spares=2))[1:]
    assert runtime["spec"]["mlPolicy"]["numNodes"] == train["spec"]["trainer"]["numNodes"] == 4


def test_what_is_not_asked_for_is_not_there():
    text = dump(render(job()))
    assert not [word for word in ("nvidia", "rdma", "IPC_LOCK", "secret", "kueue", "nodeSelector", "envFrom", "memory:") if word in text]
    (container,) = pod(render(job()))["containers"]
    assert container["resources"] == {} and pod(render(job()))["terminationGracePeriodSeconds"] == 120


def test_a_fast_network_without_gpus_is_one_device():
    (container,) = pod(render(job(settings={**SMALL, "kubernetes": {"claim": "work", "rdma": "rdma/hca"}})))["containers"]
    assert container["resources"] == {"requests": {"rdma/hca": "1"}, "limits": {"rdma/hca": "1"}}


def test_a_users_value_is_a_value():
    """Kubernetes puts variables in for $(NAME), and YAML takes words for what they are not."""
    values = {
        "A": "$(BIGTRAIN_TOKEN)", "B": "a$$b$", "C": "yes", "D": "0o17", "E": "1_000", "F": "a: b # c", "G": "'\"{}[]&*!|>%@`", "H": "ünï",
        "I": "-", "J": " x ", "K": "~", "L": "12:30:45", "M": "{{ x }}", "BIGTRAIN_TOKEN": "mine",
    }  # fmt: skip
    text = dump(render(job(environment=values)))
    (container,) = pod(list(yaml.safe_load_all(text)))["containers"]
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert {name: value.replace("$$", "$") for name, value in given.items() if name in values and value} == {
        k: v for k, v in values.items() if len(k) == 1
    }
    assert given["A"] == "$$(BIGTRAIN_TOKEN)" and given["BIGTRAIN_TOKEN"] is None and len(given) == len(container["env"])
    for name, value in given.items():  # quoted for every version of YAML, where it is no plain word
        if value and name in "DEIKL":
            assert f'"{value}"' in text


@pytest.mark.parametrize(
    "text", ["a: 1\n", " leading\n", "a\n\n\n", "no end", "tab\there\n", "x: '\x01'\n", "---\nkind: Pod\n", "a \n b\n", "é: ☃\n", "\n"]
)
def test_any_config_reaches_the_pods_as_it_is(text):
    manifests = render(job(config=text))
    assert next(yaml.safe_load_all(dump(manifests)))["data"]["config.yaml"] == text
    assert len(list(yaml.safe_load_all(dump(manifests)))) == 2


@pytest.mark.parametrize(
    "run", ["one", "One", "a.b", "a_b", "1", "0-1", "null", "yes", "x" * 200, "x" * 41 + "-", "é", "-", "..", "a--b", "run", "Run", "a b"]
)
def test_names(run):
    for number in (1, 99999):
        name = object_name(run, number)
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and name.endswith(f"-{number}")
        assert len(f"{name}-node-0-{10**6 - 1}-abcde") <= 63
        assert len(host(name, 10**6 - 1).split(".")[0]) <= 63 and KUBERNETES_ID.fullmatch(f"default/jobset/{name}")


def test_names_are_told_apart():
    runs = ["one", "One", "ONE", "a.b", "a-b", "a_b", "x" * 60, "x" * 61, "1", "r1", "-1"]
    assert len({object_name(run, 1) for run in runs}) == len(runs) and object_name("one", 12) == "one-12"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"container": None}, "launch.container.image: missing; name the image"),
        ({"container": {"image": "a b"}}, "launch.container.image: a b is no image of a registry"),
        ({"container": {"image": "/images/bigtrain.sqsh"}}, "launch.container.image: /images/bigtrain.sqsh is no image of a registry"),
        ({"container": {"image": "bigtrain.sif"}}, "is no image of a registry"),
        ({"container": {"image": "docker://bigtrain:1"}}, "is no image of a registry"),
        ({"container": {"image": "bigtrain:1", "mounts": ["/a:/b"]}}, "launch.container.mounts: a pod mounts launch.kubernetes.claim"),
        ({"kubernetes": {}}, "launch.kubernetes.claim: missing; name a PersistentVolumeClaim"),
        (
            {"forward": ["WANDB_API_KEY", "B"]},
            r"launch.forward: .* the values of WANDB_API_KEY, B, .* name it in launch.kubernetes.secrets",
        ),
        ({"kubernetes": {"claim": "work", "namespace": "Team_A"}}, "launch.kubernetes.namespace: Team_A is no name in Kubernetes"),
        ({"kubernetes": {"claim": "work", "namespace": "a.b"}}, "launch.kubernetes.namespace: a.b is no name"),
        ({"kubernetes": {"claim": "Work"}}, "launch.kubernetes.claim: Work is no name in Kubernetes; .* as in my-claim"),
        ({"kubernetes": {"claim": "w", "secrets": ["ok", "x" * 64]}}, "launch.kubernetes.secrets: x{64} is no name"),
        ({"kubernetes": {"claim": "w", "queue": "A"}}, "launch.kubernetes.queue: A is no name"),
        ({"kubernetes": {"claim": "w", "workdir": "/"}}, "launch.kubernetes.workdir: the claim mounted at / would hide the image"),
        ({"kubernetes": {"claim": "w", "node_selector": {"a": "b c"}}}, "launch.kubernetes.node_selector: a: 'b c' is no label of a node"),
        ({"kubernetes": {"claim": "w", "node_selector": {"a/b/c": ""}}}, "node_selector: a/b/c: '' is no label of a node"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        render(job(settings={**SMALL, **settings}))


@pytest.mark.parametrize("run", ["/scratch/one", "../one", "runs/../../one", "/workspace2/one", "."])
def test_a_run_that_would_be_gone_with_the_pods(run):
    with pytest.raises(UserError, match="run.folder: .* is not below launch.kubernetes.workdir"):
        render(Job(job().launch, "x-1", run, 3, CONFIG))
    assert render(Job(job().launch, "x-1", "/workspace/runs/one", 3, CONFIG))


# ---- Submission, to a stand-in ----


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(script: str) -> None:
        (tmp_path / "bin/kubectl").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncat > {tmp_path}/given\n{script}\n')
        (tmp_path / "bin/kubectl").chmod(0o755)

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    make.given = lambda: (tmp_path / "given").read_text()
    return make


def test_submission_gives_kubectl_the_manifests(kubectl):
    kubectl("echo configmap/one-1; echo jobset.jobset.x-k8s.io/one-1")
    submit(job(), render(job()))
    assert kubectl.calls() == ["create --output=name --filename=-"] and kubectl.given() == dump(render(job()))


@pytest.mark.parametrize(
    ("script", "message", "deleted"),
    [
        ("[ $1 = delete ] || { echo configmap/one-1; echo 'error: no matches for kind \"JobSet\"' >&2; exit 1; }",
         'did not take the job: kubectl: error: no matches for kind "JobSet". --dry-run shows the manifests', True),
        ("echo 'configmap/one-1'; echo '--all rm'; echo 'error: refused' >&2; exit 1",
         "error: refused; `kubectl delete --namespace=default configmap/one-1` removes what was made", True),
        ("echo 'Error from server (AlreadyExists)' >&2; exit 1", "AlreadyExists", False),
    ],
)  # fmt: skip
def test_a_submission_that_fails_leaves_nothing(kubectl, script, message, deleted):
    kubectl(script)
    with pytest.raises(RunError, match=re.escape(message)):
        submit(job(), render(job()))
    assert kubectl.calls()[1:] == ["delete --namespace=default --wait=false configmap/one-1"] * deleted


def test_the_command(kubectl, tmp_path, monkeypatch):
    """In one process: typer's runner, as the console script would."""
    from typer.testing import CliRunner

    from bigtrain.cli import app
    from bigtrain.runfolder import RunFolder

    monkeypatch.chdir(tmp_path)
    settings = ["launch.nodes=2", "launch.gpus_per_node=4", "launch.container={image: 'bigtrain:1'}", "launch.kubernetes.claim=work"]
    command = ["launch", "kubernetes", "quickstart", "run.name=one", *settings]
    kubectl("")
    shown = CliRunner().invoke(app, [*command, "--dry-run"])
    config, made = yaml.safe_load_all(shown.stdout)
    assert (
        shown.exit_code == 0
        and "OMP_NUM_THREADS" in shown.stderr
        and made["metadata"]["name"] == "one-1"
        and not (tmp_path / "runs").exists()
    )
    again = yaml.safe_load(config["data"]["config.yaml"])
    assert again["launch"]["gpus_per_node"] == 4 and again["run"]["name"] == "one"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.output == "jobset one-1 in namespace default: see bigtrain jobs, logs and cancel runs/one\n"
    assert kubectl.given() == shown.stdout
    (recorded,) = jobs.read(RunFolder("runs/one"))
    assert (recorded.kind, recorded.id, recorded.nodes) == ("kubernetes", "default/jobset/one-1", "2")
    assert "one-2" in CliRunner().invoke(app, [*command, "--dry-run"]).output
    refused = CliRunner().invoke(app, [*command, "train.accumulation=7"])
    assert refused.exit_code == 2 and "train.global_batch: global_batch 16 is not" in refused.output
    (tmp_path / "bin/kubectl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    missing = CliRunner().invoke(app, command)
    assert (
        missing.exit_code == 1 and "kubectl: not installed on this machine" in missing.output and len(jobs.read(RunFolder("runs/one"))) == 1
    )


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case}.yaml").write_text(dump(render(job(*CASES[case]))))
    sys.exit()
