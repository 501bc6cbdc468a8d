"""The launch scripts, run in a copied tree whose Python, gcloud, git, sbatch and sleep are fakes."""

import fcntl
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["cloud_tpu.sh", "local_processes.sh", "run_local.sh", "slurm.sh", "test.sh"]
SLICE = ["--project=p", "--zone=z", "--name=n", "--accelerator=v5litepod-64"]
QUEUED = "gcloud compute tpus queued-resources"
CREATE = f"{QUEUED} create n --project=p --zone=z --node-id=n --accelerator-type=v5litepod-64 " \
         "--runtime-version=v2-alpha-tpuv5-lite --spot"
DELETE = f"{QUEUED} delete n --project=p --zone=z --force --quiet"
LOOK = f"{QUEUED} list --project=p --zone=z --filter=name~/n$ --format=value(state.state)"
SCP = "gcloud compute tpus tpu-vm scp"
SSH = "gcloud compute tpus tpu-vm ssh n --project=p --zone=z --worker=all --command="
ON_WORKER = "bash awrsr_jax/launch/cloud_tpu.sh"
IS_FREE = 'mkdir -p awrsr_jax/runs/job && flock -n awrsr_jax/runs/job/lock true || { echo "$(hostname): a job is ' \
          'running already. To end it: bash launch/cloud_tpu.sh stop" >&2; exit 1; }'
GCLOUD_ON_WORKER = 'for word in "$@"; do case $word in --command=*) bash -c "${word#*=}" || exit ;; esac; done'
WORKS = 'trap "sleep 1; exit 75" TERM; echo >>"$TREE/ready"; while true; do sleep 1; done'
STATES = """
if [[ $* == *" list "* ]]; then
  head -n 1 "$TREE/states"
  sed 1d "$TREE/states" >"$TREE/left"
  mv "$TREE/left" "$TREE/states"
fi
"""
NEEDS_FLOCK = pytest.mark.skipif(not shutil.which("flock") or not pathlib.Path("/proc/self/fd").exists(),
                                 reason="a worker has flock and /proc")


class Tree:
  """A copy of the scripts with a ready .venv; `calls` is what the fake commands were asked."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "bin").mkdir()
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", root / ".venv" / "installed.txt")
    self.env = {name: value for name, value in os.environ.items() if not name.startswith("CLOUD_TPU_")}
    self.env |= {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "TREE": str(root)}
    for name in ("gcloud", "git", "sbatch"):
      self.fake(f"bin/{name}")
    self.fake("bin/sleep", f"exec {shutil.which('sleep')} 0.02", record=False)
    self.program("")

  def fake(self, path: str, text: str = "", record: bool = True) -> None:
    note = 'printf "%s\\n" "$(basename "$0") $*" >>"$TREE/calls"\n' if record else ""
    (self.root / path).write_text(f"#!/usr/bin/env bash\n{note}{text}\n")
    (self.root / path).chmod(0o755)

  def program(self, text: str) -> None:
    """Has a bash text stand in for awrsr_jax.main; $id is the process, $start counts its starts from 1."""
    self.fake(".venv/bin/python", f"""
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
id=0
for flag in "$@"; do case $flag in --process_id=*) id=${{flag#*=}} ;; esac; done
echo >>"$TREE/starts_$id"
start=$(($(wc -l <"$TREE/starts_$id")))
{text}""", record=False)

  def command(self, script: str, *args: str) -> list[str]:
    return ["bash", str(self.root / "launch" / script), *args]

  def run(self, script: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(self.command(script, *args), env=self.env, capture_output=True, text=True, timeout=20)

  def read(self, name: str) -> str:
    path = self.root / name
    return path.read_text() if path.exists() else ""

  @property
  def calls(self) -> list[str]:
    return self.read("calls").splitlines()

  def wait_for(self, name: str, text: str = "\n") -> None:
    deadline = time.monotonic() + 10
    while text not in self.read(name):
      assert time.monotonic() < deadline, f"{name} never had {text!r}"
      time.sleep(0.02)


@pytest.fixture
def tree(tmp_path):
  return Tree(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_with_the_usage_and_touches_nothing(script, tree):
  shutil.rmtree(tree.root / ".venv")
  result = tree.run(script, "--help")
  assert result.stdout.startswith(f"Usage: bash launch/{script} ") and not result.stderr and not result.returncode
  assert not (tree.root / ".venv").exists()


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if not shellcheck:
    pytest.skip("no shellcheck here")
  scripts = [f"launch/{path.name}" for path in sorted((ROOT / "launch").glob("*.sh"))]
  result = subprocess.run([shellcheck, "-x", *scripts, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
  assert not result.returncode, result.stdout


@pytest.mark.parametrize("given, added", [
    ([], "--config=configs/synthetic.py --workdir=runs/synthetic "),
    (["--config=configs/ml1m.py"], "--workdir=runs/ml1m "),
    (["--config", "configs/ml1m.py:tiny"], "--workdir=runs/ml1m "),
    (["--workdir=here", "--config=configs/ml1m.py"], ""),
    (["--workdir", "here"], "--config=configs/synthetic.py "),
])
def test_run_local_adds_what_the_flags_lack(given, added, tree):
  tree.program('echo "$*"')
  assert tree.run("run_local.sh", *given).stdout.strip() == f"-m awrsr_jax.main {added}{' '.join(given)}".strip()


@pytest.mark.parametrize("given, added", [([], "-n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder"),
                                          (["tests/losses_test.py", "-x"], "")])
def test_the_whole_suite_runs_a_file_on_each_core_at_a_time(given, added, tree):
  tree.program('echo "$*"')
  assert tree.run("test.sh", *given).stdout.strip() == f"-m pytest -q {' '.join(given)}{added}"


def test_pip_takes_the_requirements_as_constraints():
  command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "jax",
             "-c", "requirements.txt"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert not result.returncode, result.stderr


# local_processes.sh


def test_processes_get_the_flags_that_make_them_one_run(tree):
  tree.program('echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $*"')
  result = tree.run("local_processes.sh", "2", "--devices=4", "--config=configs/ml1m.py", "--config.data.path=a b")
  said = [result.stdout, tree.read("runs/ml1m.process_1.log")]
  port = re.search(r"127.0.0.1:(\d+)", said[0]).group(1)
  for number, text in enumerate(said):
    assert text == (f"cpu 4 -m awrsr_jax.main --workdir=runs/ml1m --config=configs/ml1m.py --config.data.path=a b "
                    f"--coordinator_address=127.0.0.1:{port} --num_processes=2 --process_id={number}\n")
  assert result.returncode == 0


def test_a_dry_run_of_processes_prints_one_command_each_and_starts_none(tree):
  lines = tree.run("local_processes.sh", "3", "--dry_run", "--workdir=a b/run").stdout.splitlines()
  assert len(lines) == 3
  for line in lines:
    assert line.startswith("+ env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 .venv/bin/python -m awrsr_jax.main ")
  assert lines[0].endswith("--num_processes=3 --process_id=0 &")
  assert lines[2].endswith("--num_processes=3 --process_id=2 >'a b/run.process_2.log' 2>&1 &")
  assert not tree.read("starts_0") and not (tree.root / "a b").exists()


@pytest.mark.parametrize("args", [[], ["two"], ["0"], ["2", "--devices=0"], ["2", "--restarts=x"]])
def test_a_bad_number_of_processes_is_refused(args, tree):
  result = tree.run("local_processes.sh", *args)
  assert result.returncode == 1 and "must be a number" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("ends, code", [
    (["exit 0", "exit 0"], 0),
    (["exit 75", "exit 75"], 75),
    (["exit 75", "kill -9 $$"], 75),
    (["exit 0", "kill -ABRT $$"], 75),
    (["exit 75", "exit 1"], 1),
    (["kill -9 $$", "exit 2"], 2),
    (["exit 2", "exit 1"], 2),
])
def test_bad_input_counts_before_a_lost_process_and_that_before_success(ends, code, tree):
  tree.program(f'echo "said by $id"; if ((id)); then {ends[1]}; fi; {ends[0]}')
  result = tree.run("local_processes.sh", "2")
  assert result.returncode == code
  for number, end in enumerate(ends):
    if end != "exit 0":
      ended = {"kill -9 $$": "137 (signal KILL)", "kill -ABRT $$": "134 (signal ABRT)"}.get(end, end.split()[1])
      assert f"Process {number} of 2 ended with {ended}." in result.stderr
  assert ("said by 1" in result.stderr) == (ends[1] not in ("exit 0", "exit 75"))  # the end of its log


def test_processes_that_outlive_a_failed_one_are_killed(tree):
  tree.program('if ((id == 1)); then exit 1; fi; trap "" TERM; while true; do sleep 1; done')
  result = tree.run("local_processes.sh", "3")
  assert result.returncode == 1
  assert "The others did not end within 60 s: killing them." in result.stderr
  assert "Process 2 of 3 ended with 137 (signal KILL)." in result.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_as_sigterm_and_nothing_restarts(sent, tree):
  tree.program('trap "echo told >>$TREE/told; exit 75" TERM; echo >>"$TREE/ready"; while true; do sleep 1; done')
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
  script = subprocess.Popen(tree.command("local_processes.sh", "3", "--restarts=2"), env=tree.env)
  signal.signal(signal.SIGINT, previous)
  tree.wait_for("ready", "\n" * 3)
  script.send_signal(sent)
  assert script.wait(timeout=10) == 75
  assert tree.read("told") == "told\n" * 3 and tree.read("starts_0") == "\n"


@pytest.mark.parametrize("program, starts, code", [
    ("exit $((start < 3 ? 75 : 0))", 3, 0),
    ("exit 75", 4, 75),
    ("exit $((start < 2 ? 75 : 1))", 2, 1),
    ("if ((id && start < 2)); then kill -9 $$; fi", 2, 0),
])
def test_restarts_start_all_processes_again_until_it_helps_no_more(program, starts, code, tree):
  tree.program(program)
  assert tree.run("local_processes.sh", "2", "--restarts=3").returncode == code
  assert tree.read("starts_0") == tree.read("starts_1") == "\n" * starts


# cloud_tpu.sh


@pytest.mark.parametrize("args, lines", [
    (["create"], [CREATE]),
    (["create", "--on_demand"], [CREATE.removesuffix(" --spot")]),
    (["create", "--runtime=other"], [CREATE.replace("v2-alpha-tpuv5-lite", "other")]),
    (["status"], [LOOK]),
    (["wait"], [LOOK]),
    (["setup"], ["mkdir -p runs/cloud_tpu", "git archive --format=tar.gz --output=runs/cloud_tpu/n.tar.gz HEAD",
                 f"{SCP} runs/cloud_tpu/n.tar.gz n:awrsr_jax.tar.gz --project=p --zone=z --worker=all",
                 f"{SSH}{IS_FREE}",
                 f"{SSH}tar -xzf awrsr_jax.tar.gz -C awrsr_jax && {ON_WORKER} install_here"]),
    (["follow", "--worker=3"], [f"{SSH}tail -n 50 -F awrsr_jax/runs/job/log".replace("=all", "=3")]),
    (["stop"], [f"{SSH}{ON_WORKER} stop_here"]),
    (["delete"], [DELETE]),
])
def test_a_dry_run_prints_the_commands_that_a_real_run_gives(args, lines, tree):
  tree.fake("bin/gcloud", STATES)
  (tree.root / "states").write_text("ACTIVE\n")
  printed = tree.run("cloud_tpu.sh", args[0], *SLICE, *args[1:], "--dry_run").stdout.splitlines()
  assert [" ".join(shlex.split(line)) for line in printed] == [f"+ {line}" for line in lines]
  assert not tree.calls and not (tree.root / "runs").exists()
  tree.run("cloud_tpu.sh", args[0], *SLICE, *args[1:])
  assert [call for call in tree.calls if "git status" not in call] == [line for line in lines if line[:5] != "mkdir"]


def test_settings_come_from_the_environment_too(tree):
  tree.env |= {"CLOUD_TPU_PROJECT": "p", "CLOUD_TPU_ZONE": "other", "CLOUD_TPU_NAME": "n",
               "CLOUD_TPU_ACCELERATOR": "v5litepod-64", "CLOUD_TPU_ON_DEMAND": "1"}
  assert tree.run("cloud_tpu.sh", "create", "--zone=z", "--dry_run").stdout == f"+ {CREATE.removesuffix(' --spot')}\n"


@pytest.mark.parametrize("args, message", [
    (["create"], "--project=... or CLOUD_TPU_PROJECT\n  --zone=... or CLOUD_TPU_ZONE\n  --name=... or CLOUD_TPU_NAME\n"
                 "  --accelerator=... or CLOUD_TPU_ACCELERATOR"),
    (["stop", "--project=p", "--name=n"], "stop needs settings that are not given:\n  --zone=... or CLOUD_TPU_ZONE\n"),
    (["begin"], "'begin':\ncreate, status, wait"),
    ([], "''"),
    (["create", *SLICE, "--config=configs/ml1m.py"], "--config=configs/ml1m.py is no setting"),
    (["create", *SLICE, "--", "--config=configs/ml1m.py"], "Only start takes flags"),
    (["start", *SLICE], "start needs --config and --workdir after --"),
    (["start", *SLICE, "--", "--config=c.py", "--workdir=runs/c"], "--workdir=gs://my-bucket/ml1m"),
    (["resume", *SLICE], "runs/cloud_tpu/n.flags is not here"),
    (["stop_here", "--dry_run"], "no dry run"),
])
def test_cloud_tpu_refuses_with_the_way_out(args, message, tree):
  result = tree.run("cloud_tpu.sh", *args)
  assert result.returncode == 1 and message in result.stderr and not tree.calls


def test_a_workdir_on_a_worker_needs_to_be_called_disposable(tree):
  flags = ["--", "--config=c.py", "--workdir=runs/c"]
  result = tree.run("cloud_tpu.sh", "start", *SLICE, "--disposable_workdir", "--dry_run", *flags)
  assert result.returncode == 0 and "--workdir=runs/c" in result.stdout


@pytest.mark.parametrize("states, made", [
    (["SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [DELETE, CREATE]),
    (["FAILED", "ACTIVE"], [DELETE, CREATE]),
    (["", "ACTIVE"], [CREATE]),  # there is none of this name
    (["PROVISIONING", "ACTIVE"], []),  # an earlier resume was cut off
    (["ACTIVE", "ACTIVE"], []),
])
def test_resume_makes_again_what_is_lost_and_starts_with_the_flags_of_the_last_start(states, made, tree):
  tree.fake("bin/gcloud", STATES)
  flags = ["--config=configs/ml1m.py", "--workdir=gs://bucket/ml1m", "--config.data.path=it's here"]
  assert tree.run("cloud_tpu.sh", "start", *SLICE, "--", *flags).returncode == 0
  started = tree.calls[-1]
  (tree.root / "calls").unlink()
  (tree.root / "states").write_text("".join(f"{state}\n" for state in states))
  result = tree.run("cloud_tpu.sh", "resume", *SLICE)
  assert result.returncode == 0, result.stderr
  assert [call for call in tree.calls if "queued-resources" in call and call != LOOK] == made
  assert tree.calls[-4].startswith("gcloud compute tpus tpu-vm scp") and tree.calls[-2].endswith("install_here")
  assert tree.calls[-1] == started


@pytest.mark.parametrize("gcloud, message", [
    ("exit 1", "could not be read"),  # no network
    (STATES, "n is FAILED"),
])
def test_resume_stops_at_a_state_that_it_cannot_read_or_mend(gcloud, message, tree):
  tree.fake("bin/gcloud", gcloud)
  (tree.root / "runs" / "cloud_tpu").mkdir(parents=True)
  (tree.root / "runs" / "cloud_tpu" / "n.flags").write_text("--config=c.py\n")
  (tree.root / "states").write_text("ACTIVE\nFAILED\n")
  result = tree.run("cloud_tpu.sh", "resume", *SLICE)
  assert result.returncode == 1 and message in result.stderr
  assert DELETE not in tree.calls and CREATE not in tree.calls


@NEEDS_FLOCK
def test_flags_reach_the_program_on_a_worker_as_they_were_typed(tree):
  (tree.root / "awrsr_jax").symlink_to(tree.root)  # the home folder of the worker
  tree.fake("bin/gcloud", GCLOUD_ON_WORKER)
  tree.program('printf "<%s>" "$@" >"$TREE/typed"')
  flags = ["--config=c.py", "--workdir=gs://b/c", "--config.data.path=it's \"a\" $HOME * file", "--config.x="]
  assert tree.run("cloud_tpu.sh", "start", *SLICE, "--", *flags).returncode == 0
  tree.wait_for("runs/job/exit_code")
  assert tree.read("typed") == "".join(f"<{flag}>" for flag in ["-m", "awrsr_jax.main", *flags])


@NEEDS_FLOCK
@pytest.mark.parametrize("code", [0, 1])
def test_a_worker_starts_again_after_75_and_a_signal_and_ends_with_anything_else(code, tree):
  tree.program(f"exit $((start == 1 ? 137 : start == 2 ? 75 : {code}))")
  assert tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py").returncode == 0
  tree.wait_for("runs/job/exit_code")
  assert tree.read("runs/job/exit_code") == f"{code}\n" and tree.read("starts_0") == "\n" * 3
  assert re.findall(r"The job ended with (\d+)", tree.read("runs/job/log")) == ["137", "75", str(code)]


@NEEDS_FLOCK
@pytest.mark.parametrize("code, last, starts", [(75, 0, 3), (134, 2, 4)])
def test_a_worker_ends_once_three_starts_in_a_row_saved_nothing_new(code, last, starts, tree):
  save = 'mkdir -p "a run/checkpoints/$start"'
  tree.program(f'if ((start <= {last})); then {save}; fi; exit $((start < 9 ? {code} : 0))')
  assert tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py", "--workdir=a run").returncode == 0
  tree.wait_for("runs/job/exit_code")
  assert tree.read("starts_0") == "\n" * starts
  assert f"Three starts in a row ended with checkpoint {last} as the newest" in tree.read("runs/job/log")


@NEEDS_FLOCK
def test_stop_on_a_worker_has_the_job_save_and_does_not_start_it_again(tree):
  tree.program(WORKS)
  assert tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py").returncode == 0
  tree.wait_for("ready")
  again = tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py")
  assert again.returncode == 1 and "a job is running already" in again.stderr
  assert "a job is running already" in tree.run("cloud_tpu.sh", "install_here").stderr
  assert tree.run("cloud_tpu.sh", "stop_here").stdout.endswith(": ended with 75\n")
  assert tree.read("starts_0") == "\n"
  assert tree.run("cloud_tpu.sh", "stop_here").stdout.endswith(": no job is running\n")


@NEEDS_FLOCK
def test_setup_leaves_the_code_of_a_running_job_alone(tree):
  (tree.root / "awrsr_jax").symlink_to(tree.root)  # the home folder of the worker
  tree.fake("bin/gcloud", GCLOUD_ON_WORKER)
  tree.fake("bin/tar")
  tree.program(WORKS)
  assert tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py").returncode == 0
  result = tree.run("cloud_tpu.sh", "setup", *SLICE)
  assert result.returncode == 1 and "a job is running already" in result.stderr
  assert not any(call.startswith("tar") for call in tree.calls)
  tree.wait_for("ready")
  tree.run("cloud_tpu.sh", "stop_here")


@NEEDS_FLOCK
def test_stop_on_a_worker_reaches_a_job_whose_loop_was_killed(tree):
  tree.program(WORKS)
  assert tree.run("cloud_tpu.sh", "start_here", "--", "--config=c.py").returncode == 0
  tree.wait_for("ready")
  os.kill(int(tree.read("runs/job/pid")), signal.SIGKILL)
  assert tree.run("cloud_tpu.sh", "stop_here").stdout.endswith(": ended with a code that runs/job/log may tell\n")
  assert tree.run("cloud_tpu.sh", "stop_here").stdout.endswith(": no job is running\n")


@NEEDS_FLOCK
def test_stop_on_a_worker_signals_no_process_that_has_the_number_of_the_job_now(tree):
  (tree.root / "runs" / "job").mkdir(parents=True)
  lock = tree.root / "runs" / "job" / "lock"
  with lock.open("w") as held, subprocess.Popen(["sleep", "60"]) as stranger:
    fcntl.flock(held, fcntl.LOCK_EX)
    for name in ("pid", "python_pid"):
      (lock.parent / name).write_text(f"{stranger.pid}\n")
    result = tree.run("cloud_tpu.sh", "stop_here")
    assert stranger.poll() is None
    stranger.kill()
  assert result.returncode == 1 and f"fuser -v {lock}" in result.stderr


@NEEDS_FLOCK
@pytest.mark.parametrize("too_old, fetched", [
    (0, []),
    (1, ["pip install --quiet --user uv", "uv python install --quiet 3.12", "uv python find --managed-python 3.12"]),
])
def test_install_on_a_worker_brings_a_newer_python_if_needed_and_the_build_for_tpus(too_old, fetched, tree):
  tree.fake("bin/python3", f"if [[ $1 == -c ]]; then exit {too_old}; fi")
  tree.fake(".venv/bin/python")
  assert tree.run("cloud_tpu.sh", "install_here").returncode == 0
  assert [call for call in tree.calls if " -c import" not in call] == [
      *(f"python3 -m {call}" for call in fetched),
      "python -m pip install --quiet -U jax[tpu] gcsfs -c requirements.txt"]


# slurm.sh


JOB = """#!/usr/bin/env bash
source launch/common.sh
code=0
srun --kill-on-bad-exit=0 .venv/bin/python -m awrsr_jax.main --workdir=runs/ml1m --config=configs/ml1m.py || code=$?
if ((code == 75 || code > 128)) && gets_ahead "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID.ends" runs/ml1m; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
OPTIONS = "--job-name=awrsr_jax --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --partition=gpu --account=me " \
          "--time=1:00:00 --output=runs/awrsr_jax-%j.log --open-mode=append --requeue --signal=TERM@120"
SETTINGS = ["--nodes=2", "--gpus_per_node=4", "--partition=gpu", "--account=me", "--time=1:00:00"]


def test_slurm_submits_what_its_dry_run_prints(tree):
  flags = ["--", "--config=configs/ml1m.py"]
  tree.fake("bin/sbatch", 'cat >"$TREE/job"')
  assert tree.run("slurm.sh", *SETTINGS, "--dry_run", *flags).stdout == f"+ sbatch {OPTIONS} <<'END'\n{JOB}END\n"
  assert not tree.calls and not (tree.root / "runs").exists()
  (tree.root / ".venv" / "lib" / "python3.11" / "site-packages" / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
  assert tree.run("slurm.sh", *SETTINGS, *flags).returncode == 0
  assert tree.calls == [f"sbatch {OPTIONS}"] and tree.read("job") == JOB and (tree.root / "runs").is_dir()


@pytest.mark.parametrize("args, message", [
    ([], '.venv/bin/python -m pip install -U "jax[cuda13]" -c requirements.txt'),
    (["--gpus=4"], "--gpus=4 is no setting of this script"),
    (["--config=configs/ml1m.py"], "go after --"),
    (["--nodes=two"], "--nodes must be a number, 1 or more, not 'two'"),
])
def test_slurm_refuses_with_the_way_out(args, message, tree):
  result = tree.run("slurm.sh", *args)
  assert result.returncode == 1 and message in result.stderr and not tree.calls


def test_slurm_without_gpus_has_one_process_per_node(tree):
  printed = tree.run("slurm.sh", "--cpu", "--nodes=2", "--dry_run").stdout
  assert "--nodes=2 --ntasks-per-node=1 --output" in printed
  assert "\nsrun --kill-on-bad-exit=0 env JAX_PLATFORMS=cpu .venv/bin/python -m awrsr_jax.main " in printed


def run_job(tree, srun: str) -> int:
  tree.fake("bin/srun", srun, record=False)
  tree.fake("bin/scontrol")
  (tree.root / "runs").mkdir(exist_ok=True)
  env = tree.env | {"SLURM_JOB_NAME": "awrsr_jax", "SLURM_JOB_ID": "42"}
  return subprocess.run(["bash"], input=JOB, text=True, cwd=tree.root, env=env).returncode


@pytest.mark.parametrize("code, requeued", [(0, []), (1, []), (75, ["scontrol requeue 42"]),
                                            (137, ["scontrol requeue 42"])])
def test_a_slurm_job_goes_back_to_the_queue_after_75_and_a_signal(code, requeued, tree):
  assert run_job(tree, f"exit {code}") == code and tree.calls == requeued


def test_a_slurm_job_goes_back_to_the_queue_until_three_starts_in_a_row_saved_nothing_new(tree):
  save = 'mkdir -p "runs/ml1m/checkpoints/{}"; exit 75'
  for start, text in enumerate([save.format(9), save.format(10), "exit 75", save.format("11.tmp")], start=1):
    assert run_job(tree, text) == 75 and len(tree.calls) == min(start, 3)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_a_slurm_job_on_a_full_disk_ends(tree):
  (tree.root / "runs").mkdir()
  (tree.root / "runs" / "awrsr_jax-42.ends").symlink_to("/dev/full")
  assert run_job(tree, "exit 75") == 75 and not tree.calls
