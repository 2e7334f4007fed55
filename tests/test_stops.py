"""Training beside other processes: two at once, clusters, signals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from projects import assert_same_run, at_step, killed_at, steps_of, train, write_short_project
from sparserefine.files.lock import Holder, locked
from sparserefine.machine.signals import Terminated


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with a short training; the working directory is its folder."""
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Two at once


def test_a_folder_that_another_run_writes_into_is_refused(project, capsys):
    with locked("run", "train"):
        assert train() == 1
    assert f"train (process {os.getpid()}" in capsys.readouterr().err
    assert not (project / "run").exists()
    assert train() == 0
    assert not (project / "run" / ".sparserefine.lock").exists()


def test_what_killed_runs_left_is_swept(project, monkeypatch):
    from sparserefine.files import whole

    killed_at(3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # above the highest number of a process
        left = [project / "run" / folder / whole.temporary_name() for folder in ("", "best", "last")]
    left[2].parent.mkdir()
    for path in left:
        path.write_text("half")
    killed_at(2, "--resume")
    assert not any(path.exists() for path in left)


# Clusters and signals

SLURM = {
    **{"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3"},
    **{"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "a,b"},
}
TORCHRUN = {
    **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "1"},
    **{"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1", "KUBERNETES_PORT": "tcp://x"},
}
OTHERS = {
    **{"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "x", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_RANK": "3"},
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
}
LAUNCHERS = [SLURM, TORCHRUN, OTHERS]


@pytest.mark.parametrize("variables", LAUNCHERS, ids=["slurm", "torchrun", "others"])
def test_variables_of_launchers_change_nothing(project, monkeypatch, variables):
    assert train(out="whole") == 0
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (project / "run").mkdir()
    for folder in (project, project / "run"):
        shutil.copy("whole/previous.ckpt", folder / "hpc_ckpt_1.ckpt")  # as Lightning leaves for itself
    assert train() == 0
    assert_same_run("whole", "run")
    assert {name: os.environ.get(name) for name in variables} == variables
    assert len(list(project.rglob("hpc_ckpt*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("variables", LAUNCHERS, ids=["slurm", "torchrun", "others"])
def test_launchers_change_nothing_in_a_new_process(project, variables):
    """Lightning also reads some of their variables when it is imported."""
    assert train(out="whole") == 0
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from sparserefine.commands.main import main; sys.exit(main(['train', 'config.yaml']))"
    )
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run("whole", "run")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job whose ``scontrol`` writes down what it is asked; the file with that."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    folder, asked = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return asked


def sending(number: int) -> Callable[[object], None]:
    return lambda _: signal.raise_signal(number)  # to this thread, now


@pytest.fixture
def terminating() -> Iterator[None]:
    """SIGTERM raises ``Terminated``, as on the command line; Ctrl-C is Python's own, whoever runs the tests."""

    def handler(number, _):
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is handler  # as it was
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def train_by_function(*options: str, out: str = "run", resume: bool = False) -> Path:
    """Training as a library call, whose exceptions arrive here."""
    from jsonargparse import ArgumentParser

    from sparserefine.commands.arguments import add_config, config_of
    from sparserefine.training.loop import train

    parser = ArgumentParser()
    add_config(parser)
    arguments = parser.parse_args(["--config", "config.yaml", "--out", out, *options])
    return train(config_of(parser.instantiate(arguments)), resume=resume)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_whole_files_to_go_on_with(project, monkeypatch, terminating, number, expected):
    assert train(out="whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, sending(number))
        with pytest.raises(expected) as raised:
            train_by_function()
    assert type(raised.value) is expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C works afterwards
    assert not list((project / "run").glob(".sparserefine*"))
    assert steps_of("run") == [2]
    assert train("--resume") == 0
    assert_same_run("whole", "run")


def test_ctrl_c_before_the_first_step_is_not_the_last_one(project, monkeypatch, terminating):
    """Lightning ignores any further one, and so early it does not restore anything."""
    from sparserefine.training.module import RefinerModule

    monkeypatch.setattr(RefinerModule, "configure_callbacks", sending(signal.SIGINT), raising=False)
    with pytest.raises(KeyboardInterrupt):
        train_by_function()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_without_a_handler_ends_with_143(project, monkeypatch):
    at_step(monkeypatch, 3, sending(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as raised:
            train_by_function()
        assert raised.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


REQUEUE = ["--training.slurm_requeue", "true"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_about_to_end_is_queued_again_and_goes_on(project, monkeypatch, scontrol, number):
    assert train(out="whole") == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, sending(number))
        with pytest.raises(Terminated):
            train_by_function(*REQUEUE)
    assert signal.getsignal(number) is before
    assert scontrol.read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    other = [*REQUEUE, "--training.lr", "0.5"]
    assert train(*other) == 1  # the configuration is compared
    assert train(*REQUEUE) == 0  # the same command, without --resume
    assert_same_run("whole", "run")


def test_a_signal_that_a_library_makes_another_error_of_queues_the_job_too(project, monkeypatch, scontrol):
    def swallowing(_):
        try:
            signal.raise_signal(signal.SIGUSR1)
        except KeyboardInterrupt:
            raise ValueError("cut short") from None

    at_step(monkeypatch, 1, swallowing)
    with pytest.raises(Terminated):
        train_by_function(*REQUEUE)
    assert scontrol.read_text() == "requeue 17\n"


def test_a_second_signal_does_not_keep_a_job_from_being_queued(project, monkeypatch, scontrol, terminating):
    (scontrol.parent / "bin" / "scontrol").write_text(
        f'#!/bin/sh\nkill -TERM $PPID\nsleep 0.3\necho "$@" >> {scontrol}\n'
    )
    at_step(monkeypatch, 1, sending(signal.SIGUSR1))
    with pytest.raises(Terminated):
        train_by_function(*REQUEUE)
    assert scontrol.read_text() == "requeue 17\n"


def test_what_is_no_lock_stops_no_restarted_job_for_ever(project, monkeypatch, scontrol, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (project / "run").mkdir()
    os.mkfifo(project / "run" / ".sparserefine.lock")
    assert train(*REQUEUE) == 1
    assert "is no lock of a run" in capsys.readouterr().err


def test_a_restarted_job_that_wrote_nothing_starts(project, monkeypatch, scontrol):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(*REQUEUE) == 0
    assert not scontrol.exists()


def test_a_restarted_job_needs_no_lock_of_its_former_start(project, monkeypatch, scontrol, capsys):
    """The machine it ran on is gone, and with it any way to see whether it has ended."""
    killed_at(3)
    gone = dataclasses.replace(Holder.this_process("train in SLURM job 17, start 0"), host="gone", machine="gone")
    held = dataclasses.asdict(gone)
    lock = project / "run" / ".sparserefine.lock"
    lock.write_text(json.dumps(held))
    assert train(*REQUEUE, "--resume") == 1  # not restarted
    assert "on gone" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for other in ("train in SLURM job 18, start 0", "train in SLURM job 17, start 1", "train"):
        lock.write_text(json.dumps({**held, "what": other}))
        assert train(*REQUEUE) == 1
        assert "on gone" in capsys.readouterr().err
    lock.write_text(json.dumps(held))
    assert train(*REQUEUE) == 0


def test_a_job_is_queued_again_only_if_asked_and_not_by_ctrl_c(project, monkeypatch, scontrol, terminating):
    at_step(monkeypatch, 3, sending(signal.SIGTERM))
    with pytest.raises(Terminated):
        train_by_function(out="unasked")
    at_step(monkeypatch, 3, sending(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_by_function(*REQUEUE)
    assert not scontrol.exists()


def test_a_failing_scontrol_is_said(project, monkeypatch, scontrol, caplog):
    (scontrol.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    at_step(monkeypatch, 1, sending(signal.SIGUSR1))
    with pytest.raises(Terminated):
        train_by_function(*REQUEUE)
    assert "`scontrol requeue 17` failed (no such job); submit the job again with --resume" in caplog.text
