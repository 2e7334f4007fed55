"""Training runs: killed and resumed, with broken or foreign files, diverged, in vain."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from projects import EVERY, STEPS, Killed, assert_same_run, at_step, killed_at, steps_of, train, write_short_project
from sparserefine import SparseRefiner
from sparserefine.commands.main import main
from sparserefine.engines.choose import ENGINES
from sparserefine.training import checks
from sparserefine.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from sparserefine.training.checks import DivergedError, FiniteWatch, Seen
from sparserefine.training.provenance import _git_state


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with a short training; the working directory is its folder."""
    write_short_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Resumption


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--training.accumulate", "2"],
        ["--training.precision", "bf16-mixed"],
        ["--training.accumulate", "2", "--training.precision", "bf16-mixed"],
        ["--training.ema", "0.8", "--augment.focus", "0.5", "--training.workers", "2"],
        ["--training.deep_supervision", "0.5", "--training.class_weights", "[1, 2]", "--training.boundary_weight", "1"],
    ],
    ids=["plain", "accumulate", "bf16", "both", "mean", "weights"],
)
def test_a_resumed_run_ends_at_the_bits_of_one_that_was_not_killed(project, options):
    assert train(*options, out="whole") == 0
    killed_at(3, *options)
    assert not (project / "run" / "last").exists()
    assert train("--resume", *options) == 0
    assert_same_run("whole", "run")
    assert steps_of("run") == [2, 4, 6]


def test_a_step_takes_batch_times_accumulate_crops(project, monkeypatch):
    from sparserefine.data.crops import CropDataset

    original, taken = CropDataset.__getitem__, []
    monkeypatch.setattr(CropDataset, "__getitem__", lambda self, i: (taken.append(i), original(self, i))[1])
    assert train("--training.batch", "2", "--training.accumulate", "3") == 0
    assert taken == list(range(STEPS * 2 * 3))
    assert steps_of("run") == [2, 4, 6]


def test_accumulated_gradients_are_those_of_one_larger_batch(project):
    """Up to rounding: there are labelled sites in each crop, but not equally many, so the mean is another one."""
    one_step = ["--training.steps", "1", "--training.val_every", "1", "--training.clip", "1e9"]
    assert train(*one_step, "--training.batch", "1", "--training.accumulate", "2", out="parts") == 0
    assert train(*one_step, "--training.batch", "2", out="whole") == 0
    parts, whole = (read_checkpoint(project / out / "last.ckpt")["optimizer_states"][0] for out in ("parts", "whole"))
    assert all(state["step"] == 1 for state in parts["state"].values())
    moments = [torch.cat([s["exp_avg"].flatten() for s in x["state"].values()]) for x in (parts, whole)]
    assert float(torch.cosine_similarity(*moments, dim=0)) > 0.9
    assert 0.5 < float(moments[0].norm() / moments[1].norm()) < 2


def test_a_log_never_repeats_a_step(project, monkeypatch):
    """Killed between a line of the log and the checkpoint."""
    from sparserefine.training.trainer import SaveLast

    assert train(out="whole") == 0
    original = SaveLast.on_train_epoch_end

    def dying(self, trainer, module):
        if trainer.global_step == 4:
            raise Killed
        original(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(SaveLast, "on_train_epoch_end", dying)
        with pytest.raises(Killed):
            train()
    assert steps_of("run") == [2, 4]
    assert read_checkpoint(project / "run" / "last.ckpt")["global_step"] == 2
    assert train("--resume") == 0
    assert_same_run("whole", "run")


def test_a_finished_run_is_resumed_without_a_change(project):
    assert train() == 0
    before = (project / "run" / "log.jsonl").read_text()
    assert train("--resume") == 0
    assert (project / "run" / "log.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed process is a fork of this one")
def test_a_run_killed_at_any_rename_can_be_gone_on_with(project):
    assert train(out="whole") == 0
    for count in range(100):
        shutil.rmtree("run", ignore_errors=True)
        if not exits_at_rename(count):
            break
        assert train("--resume") == 0 or train() == 0, f"neither resumed nor started after rename {count}"
        assert_same_run("whole", "run")
    assert count > 10  # of config, log, checkpoints, refiners


def exits_at_rename(count: int) -> bool:
    """Trains in a process that is gone before rename number ``count``; false if there was none."""
    process = os.fork()
    if process == 0:
        left, original = [count], Path.replace

        def replace(self, target):
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            return original(self, target)

        Path.replace = replace
        os._exit(train())
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_run_without_a_checkpoint_starts_at_step_0_and_says_so(project, caplog):
    assert train(out="whole") == 0
    killed_at(1)
    assert train("--resume") == 0
    assert "no checkpoint was written yet; starting at step 0" in caplog.text
    assert_same_run("whole", "run")


def test_a_run_that_wrote_no_result_can_be_started_again(project):
    killed_at(1)
    assert train() == 0


def test_a_best_refiner_without_a_checkpoint_stands_in_the_way_of_a_new_run_but_not_of_this_one(project, capsys):
    """The moment between the first best refiner and the first checkpoint."""
    assert train(out="whole") == 0
    killed_at(3)
    (project / "run" / "last.ckpt").unlink()
    before = (project / "run" / "best" / "model.safetensors").read_bytes()
    assert train() == 1
    assert "--resume" in capsys.readouterr().err
    assert (project / "run" / "best" / "model.safetensors").read_bytes() == before
    assert train("--resume") == 0
    assert_same_run("whole", "run")


def test_a_folder_without_a_run_is_not_resumed(project, capsys):
    assert train("--resume") == 1
    assert "no run to resume; start without --resume" in capsys.readouterr().err
    assert not (project / "run").exists()
    (project / "run" / "best").mkdir(parents=True)
    assert train() == 1
    message = capsys.readouterr().err
    assert "holds a run (best)" in message
    assert "--resume" not in message


def test_another_configuration_is_refused_with_both_values(project, capsys):
    killed_at(3)
    assert train("--resume", "--training.lr", "0.5") == 1
    assert "training.lr = 0.01, this configuration has 0.5" in capsys.readouterr().err
    same = ["--training.workers", "0", "--training.cache_gb", "0", "--training.pictures", "1"]
    assert train("--resume", *same) == 0


def test_a_run_that_was_started_before_a_field_was_there_is_resumed(project, capsys):
    assert train() == 0
    stored = json.loads((project / "run" / "config.json").read_text())
    del stored["mean"], stored["std"], stored["training"]["accumulate"], stored["augment"]["flip"]
    (project / "run" / "config.json").write_text(json.dumps(stored))
    (project / "run" / "run.json").unlink()
    assert train("--resume") == 0
    assert train("--resume", "--mean", "[0.1, 0.2, 0.3]") == 1
    assert "was made with mean = [0.485, 0.456, 0.406]" in capsys.readouterr().err
    assert train("--resume", "--training.accumulate", "2") == 1


# Broken files


def broken_checkpoint(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "empty":
        content.clear()
    elif how == "cut":
        del content[len(content) // 2 :]
    elif how == "bit":
        content[content.index(b"/data/") + 300] ^= 1  # in the content of a tensor, about which torch says nothing
    elif how == "code":
        torch.save({"state_dict": Path("x")}, path)
        return
    elif how == "other":
        torch.save({"state_dict": {}}, path)
        return
    elif how == "folder":
        path.unlink()
        path.mkdir()
        return
    elif how == "shape":
        checkpoint = torch.load(path, weights_only=True)
        name = next(name for name, x in checkpoint["state_dict"].items() if x.dim())
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:1]
        torch.save(checkpoint, path)
        return
    path.write_bytes(content)


BROKEN = ["empty", "cut", "bit", "code", "other", "folder", "shape"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_used(project, caplog, how):
    assert train(out="whole") == 0
    killed_at(5)
    broken_checkpoint(project / "run" / "last.ckpt", how)
    if how == "shape":
        read_checkpoint(project / "run" / "last.ckpt")  # whole, but it does not fit
    else:
        with pytest.raises(CheckpointError):
            read_checkpoint(project / "run" / "last.ckpt")
    assert train("--resume") == 0
    said = next(record.getMessage() for record in caplog.records if "going on" in record.getMessage())
    assert "run/last.ckpt: " in said
    assert "run/previous.ckpt" in said
    assert_same_run("whole", "run")
    assert read_checkpoint(project / "run" / "previous.ckpt")["global_step"] in (2, 4)
    assert (project / "run" / "broken.ckpt").exists()


def test_a_missing_last_checkpoint_is_named_and_the_one_before_it_is_used(project, caplog):
    """Killed between the two renames of a save."""
    assert train(out="whole") == 0
    killed_at(5)
    (project / "run" / "last.ckpt").unlink()
    assert train("--resume") == 0
    assert "run/last.ckpt: missing; going on from the checkpoint before it, run/previous.ckpt" in caplog.text
    assert_same_run("whole", "run")


def test_two_broken_checkpoints_are_one_line_without_bad_advice(project, capsys):
    killed_at(5)
    broken_checkpoint(project / "run" / "last.ckpt", "code")
    broken_checkpoint(project / "run" / "previous.ckpt", "cut")
    assert train("--resume") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "run/last.ckpt" in message
    assert "run/previous.ckpt" in message
    assert "another --out" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"origin": {"bases": 1}, "starts": 2, "training": 3}'])
def test_a_broken_file_of_a_run_is_one_line_with_a_cure(project, capsys, name, content):
    killed_at(3)
    (project / "run" / name).write_text(content)
    capsys.readouterr()
    assert train("--resume") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"run/{name}" in message
    assert "another --out" in message


def test_what_cannot_be_restored_is_named(project, capsys):
    """A checkpoint that is whole, but whose optimiser is not this one."""
    killed_at(5)
    for name in ("last.ckpt", "previous.ckpt"):
        checkpoint = torch.load(project / "run" / name, weights_only=True)
        checkpoint["optimizer_states"][0]["param_groups"].pop()
        torch.save(checkpoint, project / "run" / name)
    assert train("--resume") == 1
    assert "run/last.ckpt: cannot be restored" in capsys.readouterr().err


def test_running_out_of_memory_is_no_broken_checkpoint(project, monkeypatch, capsys):
    from sparserefine.training.module import RefinerModule

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    killed_at(5)
    monkeypatch.setattr(RefinerModule, "on_load_checkpoint", full)
    assert train("--resume") == 1
    message = capsys.readouterr().err
    assert "not enough memory" in message
    assert "cannot be restored" not in message


def test_a_checkpoint_on_a_full_disk_is_an_error_with_path_and_cure_and_the_old_one_stays(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"x": torch.zeros(10)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # files cannot grow beyond: like a full disk
    try:
        with pytest.raises(OSError, match=rf"^{path}: cannot be written \(File too large\); free space") as raised:
            write_checkpoint({"x": torch.randn(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == 27
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path, monkeypatch):
    def save(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


# Identity


def test_a_run_says_what_it_was(project):
    killed_at(3)
    assert train("--resume", "--training.seed", "0") == 0
    run = json.loads((project / "run" / "run.json").read_text())
    assert run["seed"] == 0
    assert [start["step"] for start in run["starts"]] == [0, 2]
    assert run["starts"][0]["versions"]["torch"] == version("torch")
    assert run["starts"][0]["threads"] == torch.get_num_threads()
    assert set(run["starts"][0]) >= {"time", "host", "command", "device", "precision", "git"}
    assert run["starts"][0]["engine"] in ENGINES
    assert run["starts"][0]["versions"].keys() >= {"pillow", "numpy"}
    assert run["origin"]["bases"]["base"].startswith("UNet:")
    assert len(run["origin"]["data"]["train"]) == len(run["origin"]["weights"]) == 64
    assert json.loads((project / "run" / "config.json").read_text())["training"]["steps"] == STEPS


@pytest.mark.parametrize("checkpoint", [True, False])
def test_other_weights_of_the_base_under_the_same_name_are_refused(project, capsys, checkpoint):
    killed_at(3 if checkpoint else 1)
    shutil.copy("other.safetensors", "base.safetensors")
    assert train("--resume") == 1
    message = capsys.readouterr().err
    assert "run/run.json: base had identity UNet:" in message
    assert "put the former weights back" in message


@pytest.mark.parametrize(
    ("file", "split"), [("images/1.png", "train"), ("labels/0.png", "train"), ("labels/2.png", "val")]
)
def test_changed_images_and_labels_are_refused(project, capsys, file, split):
    killed_at(3)
    with Image.open(project / "data" / file) as picture:
        pixels = np.array(picture)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(project / "data" / file)
    assert train("--resume") == 1
    assert f"data.{split} have changed since the run was started" in capsys.readouterr().err


def test_other_initial_weights_are_refused_at_step_0(project, capsys):
    assert train(out="first") == 0
    assert train("--training.seed", "5", out="second") == 0
    shutil.copytree("first/last", "init")
    init = ["--training.init", "init"]
    killed_at(1, *init)
    shutil.rmtree("init")
    shutil.copytree("second/last", "init")
    assert train("--resume", *init) == 1
    assert "started from other weights" in capsys.readouterr().err


def test_a_run_and_its_data_can_be_moved(project):
    assert train(out="whole") == 0
    killed_at(3)
    (project / "run").rename(project / "moved")
    (project / "data").rename(project / "elsewhere")
    assert train("--resume", "--data.root", "elsewhere", out="moved") == 0
    assert_same_run("whole", "moved")
    assert not (project / "run").exists()


def test_bases_and_stored_logits_can_be_moved(project, capsys):
    """They are compared by what is in them, not by their names."""
    write_fold("first.safetensors")
    stored = ["--logits.source", "stored", "--logits.folder"]
    assert main(["logits", "config.yaml", *stored, "logits"]) == 0
    killed_at(3, *stored, "logits")
    (project / "elsewhere").mkdir()
    for name in ("base.safetensors", "first.safetensors", "logits"):
        (project / name).rename(project / "elsewhere" / name)
    write_fold("elsewhere/first.safetensors")
    moved = ["--base.name", "unet:elsewhere/base.safetensors", *stored, "elsewhere/logits"]
    shutil.copy("elsewhere/base.safetensors", "same_as_base.safetensors")
    write_fold("same_as_base.safetensors")
    assert train("--resume", *moved) == 1
    assert "the base of logits.crossfit for train had identity UNet:" in capsys.readouterr().err
    write_fold("elsewhere/first.safetensors")
    assert train("--resume", *moved) == 0
    (project / "run" / "run.json").unlink()  # then names are all there is to compare
    assert train("--resume", *moved, "--base.name", "unet:same_as_base.safetensors") == 1
    assert "base.name = unet:elsewhere/base.safetensors, this" in capsys.readouterr().err


def write_fold(file: str) -> None:
    """Lets another base make the logits of the training split."""
    if not Path(file).exists():
        shutil.copy("other.safetensors", file)
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["logits"]["crossfit"] = [{"split": "train", "base": f"unet:{file}"}]
    Path("config.yaml").write_text(yaml.safe_dump(config))


def test_a_checkpoint_needs_no_initial_weights(project, capsys):
    assert train("--training.seed", "5", out="first") == 0
    shutil.copytree("first/last", "init")
    init = ["--training.init", "init"]
    assert train(*init, out="whole") == 0
    killed_at(3, *init)
    killed_at(1, *init, out="early")
    shutil.rmtree("init")
    assert train("--resume", *init) == 0
    assert_same_run("whole", "run")
    assert train("--resume", *init, out="early") == 1  # no checkpoint
    assert "init" in capsys.readouterr().err
    assert train("--resume", out="early") == 1
    assert "started from other weights" in capsys.readouterr().err
    assert train("--resume", "--training.init", "first/last", out="early") == 0  # the same weights elsewhere
    assert_same_run("whole", "early")


@pytest.mark.parametrize(("what", "other"), [("threads", 0), ("engine", "abacus")])
def test_another_number_of_threads_and_another_engine_are_said(project, caplog, what, other):
    killed_at(3)
    run = json.loads((project / "run" / "run.json").read_text())
    run["starts"][0][what] = other
    (project / "run" / "run.json").write_text(json.dumps(run))
    assert train("--resume") == 0
    assert f"goes on with other {what} than before" in caplog.text


def test_a_batch_that_no_memory_holds_is_refused_before_the_base_is_built(project, capsys):
    huge = ["--augment.crop", "[8192, 8192]", "--training.batch", "65536", "--base.name", "unet:none.safetensors"]
    assert train(*huge) == 1
    assert "training.batch = 65536 crops of 8192 x 8192 pixels" in capsys.readouterr().err


def test_images_are_hashed_once_at_a_start(project, monkeypatch):
    from sparserefine.files import digest

    stored = ["--logits.source", "stored", "--logits.folder", "logits"]
    assert main(["logits", "config.yaml", *stored]) == 0
    original, hashed = digest.regular_file, []
    monkeypatch.setattr(digest, "regular_file", lambda path, *what: (hashed.append(path), original(path, *what))[1])
    assert train(*stored) == 0
    hashed = [path for path in hashed if path.is_relative_to("data")]
    assert len(hashed) == len(set(hashed)) == 6  # two images and labels to train, one of each to validate


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_revision_of_the_project_around_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    assert _git_state() is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert _git_state() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("22")
    # A repository's own settings can name programs; nobody asked for them to run.
    git("config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; false")
    assert _git_state() == {"revision": git("rev-parse", "HEAD"), "dirty": True}
    git("config", "filter.evil.clean", f"touch {tmp_path / 'ran'}; cat")
    (tmp_path / ".gitattributes").write_text("* filter=evil\n")
    assert _git_state() == {"revision": git("rev-parse", "HEAD"), "dirty": None}
    assert not (tmp_path / "ran").exists()


# Divergence


def log_of(out: str) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_run_that_diverges_stops_with_the_batch_and_stores_nothing_of_it(project, monkeypatch, capsys, what):
    from sparserefine.training import module

    original, calls = module.refinement_loss, []

    def diverging(sparse, refined, *options):
        calls.append(None)
        loss = original(sparse, refined, *options)
        if len(calls) < 5:
            return loss
        return loss * torch.nan if what == "loss" else loss + (0 * sparse).sum().sqrt()

    monkeypatch.setattr(module, "refinement_loss", diverging)
    assert train() == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"step 5: the {what} of images 0, 1 is nan at learning rate 0.00" in message.replace("1, 0", "0, 1")
    assert "training.lr" in message
    assert "32-true" in message
    assert len(calls) == 5
    assert [line["step"] for line in log_of("run")] == [2, 4]
    SparseRefiner.from_pretrained("run/best")
    state = read_checkpoint(project / "run" / "last.ckpt")["state_dict"]
    assert all(bool(x.isfinite().all()) for x in state.values())


def test_a_learning_rate_that_is_far_too_high(project, capsys):
    assert train("--training.lr", "1e30", "--training.clip", "1e30") == 1
    assert "learning rate 1e+30" in capsys.readouterr().err
    assert not (project / "run" / "best").exists()
    assert not (project / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_statistics_that_are_infinite_are_never_stored(project, monkeypatch, capsys, step):
    def poison(module):
        buffers = module.refiner.extractor.named_buffers()
        next(buffer for name, buffer in buffers if name.endswith("running_var")).fill_(torch.inf)

    at_step(monkeypatch, step, poison)
    assert train() == 1
    assert f"step {step + 1}: " in (message := capsys.readouterr().err)
    assert "running_var" in message
    assert (project / "run" / "best").exists() == (project / "run" / "last.ckpt").exists() == (step == 3)
    assert [line["step"] for line in log_of("run")] == [2] * (step == 3)


class OnGpu:
    """A scalar as on a GPU: reading it is counted."""

    device = torch.device("cuda")
    reads = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def float(self) -> torch.Tensor:
        OnGpu.reads += 1
        return torch.tensor(self.value)


def test_on_a_gpu_losses_are_read_now_and_then(monkeypatch):
    monkeypatch.setattr(OnGpu, "reads", 0)
    watch = FiniteWatch()
    for step in range(checks.READ_EVERY):
        watch.add(Seen("loss", OnGpu(torch.nan if step in (7, 9) else 0.0), (f"image {step}",), step, 0.1))
        watch.add(Seen("gradient norm", OnGpu(0.0), (f"image {step}",), step, 0.1))
    assert OnGpu.reads == 0
    with pytest.raises(DivergedError, match=r"^step 7: the loss of images image 7 is nan"):
        watch.add(Seen("loss", OnGpu(0.0), ("last",), checks.READ_EVERY, 0.1))
    watch.check()  # what was read is forgotten


def test_names_in_the_message_are_printable():
    with pytest.raises(DivergedError, match=r"images a\\x1b\[31m, b is inf"):
        FiniteWatch().add(Seen("loss", torch.tensor(torch.inf), ["a\x1b[31m", "b", "b"], 1, 0.1))


# Nothing to learn or to score


def relabel(project: Path, names: str, value: int) -> None:
    for name in names:
        path = project / "data" / "labels" / f"{name}.png"
        with Image.open(path) as picture:
            Image.fromarray(np.full_like(np.array(picture), value)).save(path)


def test_nothing_to_learn_is_said_at_the_start_and_is_an_error_at_the_end(project, caplog, capsys):
    relabel(project, "01", 255)
    assert train() == 1
    assert "no pixel is both selected and labelled, so nothing can be learnt" in caplog.text
    assert "nothing was learnt, so there is no best refiner" in capsys.readouterr().err
    assert not (project / "run" / "best").exists()
    assert train("--resume") == 1  # and it stays so


def test_a_threshold_that_no_pixel_reaches(project, caplog, capsys):
    assert train("--selector.threshold", "0.69314") == 1
    assert "lower selector.threshold = 0.69314" in caplog.text
    assert "lower selector.threshold = 0.69314" in capsys.readouterr().err
    line = log_of("run")[0]
    assert line["val_refined"] == line["val_coarse"]
    assert line["loss"] == 0


@pytest.mark.parametrize("value", [255, 0])
def test_nothing_to_score_is_said_at_the_start_and_is_an_error_at_the_end(project, caplog, capsys, value):
    """Nothing labelled; or nothing as class 1, whatever is predicted."""
    relabel(project, "2", value)
    assert train() == 1
    assert "validation split: no pixel is labelled as class 1, line" in caplog.text
    assert "no validation had a score, so there is no best refiner" in capsys.readouterr().err
    assert not (project / "run" / "best").exists()
    assert [line["val_refined"] for line in log_of("run")] == [None, None, None]


def test_nothing_is_said_of_a_split_that_has_something(project, caplog):
    relabel(project, "0", 255)
    assert train() == 0
    assert not caplog.records


# Records


def test_pictures_of_validation_images(project):
    assert train("--training.pictures", "1") == 0
    pictures = sorted((project / "run" / "pictures").glob("*.png"))
    assert len(pictures) == STEPS // EVERY
    with Image.open(pictures[0]) as picture:
        assert picture.width < 1024


def test_the_bar_tells_density_throughput_and_memory(project, capsys):
    assert train() == 0
    shown = "".join(capsys.readouterr())
    assert all(f"{name}=" in shown for name in ("loss", "density", "crops/s", "GB"))


def test_the_bar_rarely_reads_the_gpu():
    from sparserefine.training.trainer import RunBar

    assert RunBar(2, torch.device("cuda")).refresh_rate == checks.READ_EVERY
    assert RunBar(2, torch.device("cpu")).refresh_rate == 1
