"""What ``replicax launch --print`` prints: engines accept it, and the program gets its arguments."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from replicax_cli.jobs import FORMATS, Job

SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())

PROGRAMS = {
    "script": ("train.py",),
    "module": ("-m", "pkg.train", "--lr", "0.1"),
    "quotes": (
        "runs/a b/train.py",
        "it's",
        'a "b"',
        "$HOME",
        "$(HOME)",
        "$$(HOME)",
        "$",
        "`id`",
        "\\n",
        "a\nb",
        "",
        "*",
    ),
    "unicode": ("train.py", "é", "\N{GRINNING FACE}", "\x85\u2028\ufeff\x7f\t"),
}

# Each process writes a file of its own: mpirun may mix what processes print.
FAKE = f"""#!{sys.executable} -S
import json, os, pathlib, sys
names = "JAX_LOCAL_DEVICE_IDS", "SRUN_CPUS_PER_TASK", "OMPI_COMM_WORLD_RANK"
text = json.dumps([sys.argv, {{name: os.environ[name] for name in names if name in os.environ}}])
pathlib.Path(os.environ["FOUND"], str(os.getpid())).write_text(text)
"""

program = pytest.mark.parametrize("words", PROGRAMS.values(), ids=PROGRAMS)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture
def run(tmp_path):
    """Runs a text with bash, where a command writes its arguments and its environment into a file."""

    def run_text(text, command, **variables):
        fake = tmp_path / command
        fake.write_text(FAKE)
        fake.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        found = Path(tempfile.mkdtemp(dir=tmp_path))
        done = subprocess.run(
            ["bash", "-c", text],
            env=os.environ | {"PATH": path, "FOUND": str(found), **variables},
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results = [json.loads(file.read_text()) for file in found.iterdir()]
        return [([command, *words[1:]], environment) for words, environment in results]

    return run_text


# ---------------------------------------------------------------------------------------------------------------
# Jobs


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("train.py",), "train"),
        (("/data/My Runs/Train_v2.final.py", "x.py"), "train-v2-final"),
        (("-m", "pkg.sub.train"), "pkg-sub-train"),
        (("2d.py",), "job-2d"),
        (("-.py",), "job"),
        (("été.py",), "t"),
        ((f"{'a' * 39}-b.py",), "a" * 39),
    ],
)
def test_names(words, name):
    assert Job(1, words).name == name


@given(texts, st.integers(1, 10**6))
def test_names_are_short_enough_for_dns(script, processes):
    # JobSet's webhook refuses what is no DNS label: https://github.com/kubernetes-sigs/jobset/blob/main/pkg/webhooks/jobset_webhook.go
    pod = f"{Job(processes, (script,)).name}-process-0-{processes - 1}-abcde"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", pod)
    assert len(pod) <= 63


# ---------------------------------------------------------------------------------------------------------------
# Slurm


@program
def test_slurm(run, words):
    text = FORMATS["slurm"](Job(4, words, devices=2, max_restarts=3, grace=1.5, heartbeat=60.0))
    [(command, environment)] = run(text, "replicax", SLURM_GPUS_PER_TASK="2")
    options = ["--max-restarts", "3", "--grace", "1.5", "--devices-per-process", "2", "--heartbeat", "60"]
    assert command == ["replicax", "launch", *options, *words]
    assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1"


def test_slurm_options():
    text = FORMATS["slurm"](Job(4, ("runs/train.py",), devices=2, max_restarts=3, grace=1.5))
    assert text.startswith("#!/bin/bash\n")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "#SBATCH --job-name=train",
        "#SBATCH --ntasks=4",
        "#SBATCH --signal=B:TERM@2",  # whole seconds
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    ]
    # Slurm reads no options after the first command.
    assert text.rindex("#SBATCH") < min(text.index(word) for word in ("\nif", "\nexec"))
    assert "\n##SBATCH --gpus-per-task=2\n" in text


def test_slurm_leaves_out_what_is_not_asked_for():
    text = FORMATS["slurm"](Job(1, ("train.py",), grace=0))
    for word in ("--signal", "--requeue", "--devices-per-process", "--heartbeat"):
        assert word not in text


def test_slurm_passes_the_cpus_of_a_task_on_to_srun(run):
    text = FORMATS["slurm"](Job(1, ("train.py",)))
    [(_, environment)] = run(text, "replicax", SLURM_CPUS_PER_TASK="3")
    assert environment["SRUN_CPUS_PER_TASK"] == "3"
    [(_, environment)] = run(text, "replicax", SLURM_CPUS_PER_TASK="")
    assert "SRUN_CPUS_PER_TASK" not in environment


def slurm_runs():
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def test_sbatch_accepts_the_file(tmp_path):
    if not slurm_runs():
        pytest.skip("Slurm does not run here")
    file = tmp_path / "job.sbatch"
    file.write_text(FORMATS["slurm"](Job(2, PROGRAMS["quotes"], devices=2, max_restarts=3, heartbeat=60.0)))
    done = subprocess.run(
        ["sbatch", "--test-only", file], capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------
# JobSet


def manifest(text):
    found = YAML(typ="safe", pure=True).load(text)
    jsonschema.validate(found, SCHEMA)
    return found


def pod(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def expanded(word):
    """What Kubernetes makes of a word of a command: ``$(NAME)`` is a variable, and ``$$`` is ``$``."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "variable", word)


@program
def test_jobset(words):
    found = manifest(FORMATS["jobset"](Job(4, words, devices=2, max_restarts=3, grace=1.5, heartbeat=60.0)))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 3}
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert (pod(found)["restartPolicy"], pod(found)["terminationGracePeriodSeconds"]) == ("Never", 2)  # whole seconds
    assert pod(found)["shareProcessNamespace"] is True  # else the program is process 1, and ignores SIGTERM
    [container] = pod(found)["containers"]
    assert [expanded(word) for word in container["command"]][:2] == ["replicax", "launch"]
    assert [expanded(word) for word in container["command"]][-len(words) :] == list(words)


def test_jobset_environment():
    found = manifest(FORMATS["jobset"](Job(4, ("runs/train.py",), devices=2, heartbeat=60.0)))
    variables = {variable.pop("name"): variable for variable in pod(found)["containers"][0]["env"]}
    values = {name: variable["value"] for name, variable in variables.items() if "value" in variable}
    assert values == {
        "REPLICAX_COORDINATOR": f"{found['metadata']['name']}-process-0-0.{found['metadata']['name']}:8476",
        "REPLICAX_PROCESSES": "4",
    }
    command = pod(found)["containers"][0]["command"]
    assert command[2:] == ["--devices-per-process", "2", "--heartbeat", "60", "runs/train.py"]
    assert found["spec"]["replicatedJobs"][0]["name"] == "process"
    fields = {name: x["valueFrom"]["fieldRef"]["fieldPath"] for name, x in variables.items() if "valueFrom" in x}
    assert fields == {
        "REPLICAX_PROCESS": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
        "REPLICAX_ATTEMPT": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']",
        "REPLICAX_RESTART": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']",
    }


@pytest.mark.parametrize("devices", [None, 2])
def test_jobset_with_its_comment_on_gpus(devices):
    above, below = FORMATS["jobset"](Job(4, ("train.py",), devices=devices)).split("# With GPUs:")
    [container] = pod(manifest(above + below.replace("# ", "")))["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": devices or 1}}


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(st.lists(texts))
def test_jobset_keeps_any_argument(words):
    found = manifest(FORMATS["jobset"](Job(1, ("train.py", *words))))
    assert [expanded(word) for word in pod(found)["containers"][0]["command"][3:]] == words


def test_the_schema_refuses_a_misspelt_field():
    text = FORMATS["jobset"](Job(1, ("train.py",)))
    with pytest.raises(jsonschema.ValidationError, match="'backOffLimit' was unexpected"):
        manifest(text.replace("backoffLimit", "backOffLimit"))


# ---------------------------------------------------------------------------------------------------------------
# Commands


@program
def test_mpirun(run, words):
    text = FORMATS["mpirun"](Job(4, words, devices=2, heartbeat=0.5))
    [(command, _)] = run(text, "mpirun")
    options = ["--devices-per-process", "2", "--heartbeat", "0.5"]
    assert command == ["mpirun", "-n", "4", "--bind-to", "none", "replicax", "launch", *options, *words]
    [(command, _)] = run(FORMATS["mpirun"](Job(4, words)), "mpirun")
    assert command == ["mpirun", "-n", "4", "--bind-to", "none", "replicax", "launch", *words]


@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="Open MPI is not installed")
def test_open_mpi_runs_the_command(run):
    words = PROGRAMS["quotes"]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    several = {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    found = run(FORMATS["mpirun"](Job(2, words, devices=3)), "replicax", **allowed, **several)
    assert [command for command, _ in found] == [["replicax", "launch", "--devices-per-process", "3", *words]] * 2
    assert {environment["OMPI_COMM_WORLD_RANK"] for _, environment in found} == {"0", "1"}


@program
def test_torchrun(run, words):
    text = FORMATS["torchrun"](Job(4, words, devices=2, max_restarts=3, heartbeat=60.0))
    [(command, _)] = run(text, "torchrun")
    options = ["--standalone", "--nproc-per-node", "4", "--max-restarts", "3", "--no-python"]
    own = ["--devices-per-process", "2", "--heartbeat", "60"]
    assert command == ["torchrun", *options, "replicax", "launch", *own, *words]
    assert shlex.split(FORMATS["torchrun"](Job(4, words)))[0] == "torchrun"


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        (
            "mpirun",
            {"max_restarts": 1},
            "mpirun cannot restart processes: leave out --max-restarts, or use --print slurm, jobset or torchrun",
        ),
        (
            "mpirun",
            {"grace": 5},
            "mpirun always sends SIGKILL 1 second after SIGTERM: leave out --grace, or use --print slurm or jobset",
        ),
        (
            "torchrun",
            {"grace": 5},
            "torchrun always sends SIGKILL 30 seconds after SIGTERM: leave out --grace, or use --print slurm or jobset",
        ),
    ],
)
def test_refused(engine, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FORMATS[engine](Job(2, ("train.py",), **options))


def test_starts_without_jax():
    code = "import sys, replicax_cli.jobs; print(sorted(sys.modules.keys() & {'jax', 'numpy', 'replicax'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True)
    assert done.stdout == "[]\n"
