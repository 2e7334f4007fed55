import errno
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparserefine import (
    read_image,
    read_label,
)
from sparserefine.bases.families.unet import UNet
from sparserefine.commands.info import info, info_text
from sparserefine.commands.main import main
from sparserefine.commands.predict import HOW_TO_GO_ON
from sparserefine.files import whole
from sparserefine.files.images import read_pixels, save_png
from sparserefine.files.lock import LockedError, locked
from sparserefine.files.whole import temporary_name
from sparserefine.inference.predict import Failure, predict
from tiny import CLASSES, tiny_refiner


@pytest.fixture(scope="module")
def refiner():
    return tiny_refiner()


def photo(path, height=24, width=32, seed=0, **options):
    """Writes a smooth random photograph of that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def only(report):
    (failure,) = report.failures
    return failure


def test_writes_what_the_refiner_says_in_the_colours_of_the_classes(tmp_path, refiner):
    path = photo(tmp_path / "in" / "a.png")
    report = predict([path], refiner, tmp_path / "out")
    assert report.written == (tmp_path / "out" / "a.png",)
    assert not report.failures
    with torch.no_grad():
        expected = refiner(read_image(path)[None])
    assert torch.equal(read_label(report.written[0]), expected.labels()[0].long())
    shown = read_image(report.written[0])
    assert torch.equal(
        shown.permute(1, 2, 0), torch.tensor(CLASSES.palette, dtype=torch.uint8)[expected.labels()[0].int()]
    )
    (done,) = report.images
    assert done.size == (24, 32)
    assert done.density == pytest.approx(200 / (24 * 32))
    assert done.ms > 0


def test_the_exif_rotation_is_that_of_a_viewer(tmp_path, refiner):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    path = photo(tmp_path / "turned.jpg", 24, 32, exif=exif)
    assert predict([path], refiner, tmp_path / "out").images[0].size == (32, 24)
    assert read_label(tmp_path / "out" / "turned.png").shape == (32, 24)


def test_folders_are_walked_and_sub_folders_kept(tmp_path, refiner):
    root = tmp_path / "in"
    for name in ("a.jpg", "deep/er/b.TIF", "deep/c.d.png", ".hidden.png", ".thumbs/x.png"):
        photo(root / name)
    (root / "notes.txt").write_text("no image")
    before = contents(root)
    report = predict([root], refiner, tmp_path / "out")
    assert names(tmp_path / "out") == ["a.png", "deep/c.d.png", "deep/er/b.png"]
    assert not report.failures
    assert contents(root) == before


def test_links_between_folders_end(tmp_path, refiner):
    photo(tmp_path / "in" / "sub" / "a.png")
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    photo(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    predict([tmp_path / "in"], refiner, tmp_path / "out")
    assert names(tmp_path / "out") == ["link/b.png", "sub/a.png"]


@pytest.mark.parametrize("absolute", [True, False])
def test_patterns_keep_folders_below_their_first_wildcard(tmp_path, refiner, monkeypatch, absolute):
    for name in ("x/img.png", "y/z/img.png", ".cache/img.png", "y/notes.txt"):
        photo(tmp_path / "in" / name) if name.endswith("png") else (tmp_path / "in" / name).write_text("")
    monkeypatch.chdir(tmp_path)
    prefix = f"{tmp_path}/" if absolute else ""
    assert not predict([f"{prefix}in/**/*"], refiner, "all").failures
    assert names(tmp_path / "all") == ["x/img.png", "y/z/img.png"]
    predict([f"{prefix}in/*/*.png"], refiner, "one")
    assert names(tmp_path / "one") == ["x/img.png"]


def test_a_pattern_cannot_lead_out_of_the_output_folder(tmp_path, refiner):
    photo(tmp_path / "in" / "sub" / "a.png")
    photo(tmp_path / "b.png")
    report = predict([f"{tmp_path}/in/*/../../b.png"], refiner, tmp_path / "out")
    assert report.written == (tmp_path / "out" / "b.png",)


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path, refiner):
    path = photo(tmp_path / "a[1].png")
    assert not predict([str(path)], refiner, tmp_path / "out").failures
    assert names(tmp_path / "out") == ["a[1].png"]


def test_one_input_need_not_be_a_list_and_none_is_refused(tmp_path, refiner):
    path = photo(tmp_path / "a.png")
    assert len(predict(str(path), refiner, tmp_path / "out").images) == 1
    with pytest.raises(ValueError, match="nothing to predict"):
        predict([], refiner, tmp_path / "out")


def test_a_file_named_twice_is_done_once(tmp_path, refiner):
    path = photo(tmp_path / "in" / "a.png")
    report = predict([tmp_path / "in", path, f"{tmp_path}/in/*.png"], refiner, tmp_path / "out")
    assert len(report.images) == 1
    assert not report.failures


def test_names_that_meet_keep_their_suffix(tmp_path, refiner):
    for name in ("a.jpg", "a.tif", "a_jpg.bmp", "b.png"):
        photo(tmp_path / "in" / name)
    report = predict([tmp_path / "in"], refiner, tmp_path / "out")
    assert not report.failures
    # a_jpg.bmp would have been a_jpg.png, which a.jpg needs now.
    assert names(tmp_path / "out") == ["a_jpg.png", "a_jpg_bmp.png", "a_tif.png", "b.png"]


def test_an_overlay_does_not_replace_the_labels_of_another_image(tmp_path, refiner):
    for name in ("a.jpg", "a_overlay.jpg"):
        photo(tmp_path / "in" / name)
    report = predict([tmp_path / "in"], refiner, tmp_path / "out", overlay=True)
    assert not report.failures
    assert len(names(tmp_path / "out")) == len(set(report.written)) == 4
    predict([tmp_path / "in"], refiner, tmp_path / "plain")
    assert names(tmp_path / "plain") == ["a.png", "a_overlay.png"]


def test_names_that_cannot_be_parted_are_failures_of_both(tmp_path, refiner):
    one, other = photo(tmp_path / "1" / "a.png"), photo(tmp_path / "2" / "a.png")
    photo(tmp_path / "2" / "b.png")
    report = predict([tmp_path / "1", tmp_path / "2"], refiner, tmp_path / "out")
    assert names(tmp_path / "out") == ["b.png"]
    assert [f.name for f in report.failures] == [str(one), str(other)]
    assert str(other) in report.failures[0].reason
    assert str(one) in report.failures[1].reason


def test_existing_outputs_stay_unless_overwritten(tmp_path, refiner):
    path = photo(tmp_path / "a.jpg")
    out = tmp_path / "out"
    predict([path], refiner, out)
    (out / "a.png").write_bytes(b"mine")
    failure = only(predict([path], refiner, out))
    assert "--overwrite" in failure.reason
    assert str(out / "a.png") in failure.reason
    assert (out / "a.png").read_bytes() == b"mine"
    assert not predict([path], refiner, out, overwrite=True).failures
    assert read_label(out / "a.png").shape == (24, 32)


def test_an_existing_overlay_stays_too_and_leaves_no_half(tmp_path, refiner):
    path = photo(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a_overlay.png").write_bytes(b"mine")
    assert "a_overlay.png" in only(predict([path], refiner, tmp_path / "out", overlay=True)).reason
    assert names(tmp_path / "out") == ["a_overlay.png"]


@pytest.mark.parametrize("linked", [False, True])
def test_an_input_is_never_overwritten(tmp_path, refiner, linked):
    path = photo(tmp_path / "in" / "a.png")
    out = tmp_path / "in"
    if linked:
        out = tmp_path / "out"
        out.mkdir()
        (out / "a.png").symlink_to(path)
    before = contents(tmp_path)
    failure = only(predict([path], refiner, out, overwrite=True))
    assert "never overwritten" in failure.reason
    assert contents(tmp_path) == before


def test_the_other_inputs_are_not_overwritten_either(tmp_path, refiner):
    jpg, png = photo(tmp_path / "a.jpg"), photo(tmp_path / "b" / "a.png")
    before = png.read_bytes()
    report = predict([jpg, png.rename(tmp_path / "a_jpg.png")], refiner, tmp_path, overwrite=True)
    assert (tmp_path / "a_jpg.png").read_bytes() == before
    assert names(tmp_path) == ["a.jpg", "a.png", "a_jpg.png"]
    assert only(report).name.endswith("a_jpg.png")


def test_earlier_outputs_are_no_inputs(tmp_path, refiner):
    root = tmp_path / "in"
    photo(root / "a.jpg")
    photo(root / "sub" / "b.jpg")
    for inputs in ([root], [f"{root}/**/*"], [root]):
        report = predict(inputs, refiner, root / "out", overlay=True, overwrite=True)
        assert not report.failures
        assert names(root / "out") == ["a.png", "a_overlay.png", "sub/b.png", "sub/b_overlay.png"]


def test_an_input_folder_is_no_output_folder_but_a_pattern_may_share_it(tmp_path, refiner):
    photo(tmp_path / "a.jpg")
    assert "output folder" in only(predict([tmp_path], refiner, tmp_path)).reason
    assert names(tmp_path) == ["a.jpg"]
    assert not predict([f"{tmp_path}/*.jpg"], refiner, tmp_path).failures
    assert names(tmp_path) == ["a.jpg", "a.png"]


def test_bad_files_are_named_and_the_others_done(tmp_path, refiner):
    root = tmp_path / "in"
    whole = photo(root / "z.jpg", 200, 200).read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not an image")
    (root / "empty.webp").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "grey.tif")
    before = contents(root)
    report = predict([root], refiner, tmp_path / "out")
    assert names(tmp_path / "out") == ["z.png"]
    assert [Path(f.name).name for f in report.failures] == ["cut.jpg", "empty.webp", "grey.tif", "text.png"]
    assert all(f.reason and not f.reason.startswith(f.name) for f in report.failures)
    assert "1 image predicted" in report.summary()
    assert report.summary().endswith("4 failures")
    assert contents(root) == before


def test_inputs_that_give_nothing_are_failures_and_make_no_folder(tmp_path, refiner):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    inputs = [
        tmp_path / "missing.png",
        tmp_path / "empty",
        f"{tmp_path}/empty/*.txt",
        f"{tmp_path}/nowhere/**/*.png",
        "x" * 400,
    ]
    report = predict(inputs, refiner, tmp_path / "out")
    assert [f.name for f in report.failures] == [str(i) for i in inputs]
    assert "no such file" in report.failures[0].reason
    assert all("no image found" in f.reason for f in report.failures[1:4])
    assert not report.written
    assert report.summary() == "0 images predicted, 5 failures"
    assert not (tmp_path / "out").exists()


def test_a_file_as_output_folder_is_refused(tmp_path, refiner):
    path = photo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected a folder"):
        predict([path], refiner, path)


class Moody(torch.nn.Module):
    """A base that objects to images more than 20 pixels wide, as half the image's width."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, image):
        if image.shape[-1] > 20:
            raise self.error
        return torch.cat([image[:, :1], -image[:, :1], 2 * image[:, :1]], 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("width 32 is odd"), "^width 32 is odd$"),
        (RuntimeError("sizes differ\nlong trace"), "^RuntimeError: sizes differ$"),
        (torch.OutOfMemoryError("CUDA out of memory."), "^out of memory .*smaller budget"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "^out of memory .*smaller budget"),
        (MemoryError(), "^out of memory; .*smaller budget"),
    ],
)
def test_what_goes_wrong_in_a_base_is_a_failure_of_that_image(tmp_path, error, words):
    for name, width in (("a.png", 64), ("b.png", 32)):
        photo(tmp_path / "in" / name, 24, width)
    report = predict([tmp_path / "in"], tiny_refiner(Moody(error)), tmp_path / "out")
    assert names(tmp_path / "out") == ["b.png"]
    failure = only(report)
    assert failure.name.endswith("a.png")
    assert re.search(words, failure.reason)


def test_logits_that_are_not_finite_are_failures(tmp_path):
    model = UNet(3, planes=(4, 8))
    torch.nn.init.constant_(model.head.bias, float("nan"))
    report = predict([photo(tmp_path / "a.png")], tiny_refiner(model), tmp_path / "out")
    assert "NaN or infinite" in only(report).reason
    assert not (tmp_path / "out").exists()


def test_interrupting_interrupts_and_leaves_whole_files_only(tmp_path):
    for name, width in (("a.png", 32), ("b.png", 64)):
        photo(tmp_path / "in" / name, 24, width)
    refiner, done = tiny_refiner(Moody(KeyboardInterrupt())), []
    with pytest.raises(KeyboardInterrupt):
        predict([tmp_path / "in"], refiner, tmp_path / "out", seen=done.append)
    assert names(tmp_path / "out") == ["a.png"]
    assert [image.image.name for image in done] == ["a.png"]


def fail_at_overlay(monkeypatch, error):
    def save(file, pixels, palette):
        if pixels.dim() == 3:  # the labels are complete then
            raise error
        save_png(file, pixels, palette)

    monkeypatch.setattr("sparserefine.inference.predict.save_png", save)


def fail_at_second_rename(monkeypatch, error):
    """The overlay has its name then, the labels have not."""
    renames, replace = [], Path.replace

    def failing(path, target):
        renames.append(target)
        if len(renames) == 2:
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)


@pytest.mark.parametrize("when", [fail_at_overlay, fail_at_second_rename])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["failure", "Ctrl-C"])
def test_an_image_gets_all_of_its_outputs_or_none(tmp_path, refiner, monkeypatch, error, when):
    when(monkeypatch, error)
    path = photo(tmp_path / "in" / "a.png")
    if isinstance(error, OSError):
        reason = only(predict([path], refiner, tmp_path / "out", overlay=True)).reason
        assert "(Input/output error)" in reason
        assert reason.count("cannot be written") == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            predict([path], refiner, tmp_path / "out", overlay=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", [fail_at_overlay, fail_at_second_rename])
def test_a_failure_while_overwriting_never_leaves_outputs_of_two_runs(tmp_path, refiner, monkeypatch, when):
    path = photo(tmp_path / "in" / "a.png")
    predict([path], refiner, tmp_path / "out", overlay=True)
    before = contents(tmp_path / "out")
    photo(path, seed=1)
    with monkeypatch.context() as patch:
        when(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            predict([path], refiner, tmp_path / "out", overlay=True, overwrite=True)
    after = contents(tmp_path / "out")
    assert after.items() <= before.items()
    assert tmp_path / "out" / "a.png" in after
    report = predict([path], refiner, tmp_path / "out", overlay=True, skip_existing=True)
    assert len(report.images) == (after != before)


# ---- going on, two at once, full disks, what other processes do


def test_what_exists_is_kept_and_counted(tmp_path, refiner):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photo(tmp_path / "in" / name)
    out = tmp_path / "out"
    predict([tmp_path / "in"], refiner, out, overlay=True)
    (out / "b_overlay.png").unlink()  # as after a kill between the two
    (out / "a.png").write_bytes(b"mine")
    (out / "b.png").write_bytes(b"half")
    report = predict([tmp_path / "in"], refiner, out, overlay=True, skip_existing=True)
    assert [image.image.name for image in report.images] == ["b.jpg"]
    assert [image.name for image in report.present] == ["a.jpg", "c.jpg"]
    assert not report.failures
    assert (out / "a.png").read_bytes() == b"mine"
    assert read_label(out / "b.png").shape == (24, 32)
    assert report.summary().startswith("1 image predicted (")
    assert report.summary().endswith(", 2 present already")


def test_an_input_is_not_taken_for_its_own_output(tmp_path, refiner):
    path = photo(tmp_path / "a.png")
    assert "never overwritten" in only(predict([path], refiner, tmp_path, skip_existing=True)).reason


def test_overwriting_and_keeping_contradict_each_other(tmp_path, refiner):
    with pytest.raises(ValueError, match="contradict"):
        predict([photo(tmp_path / "a.png")], refiner, tmp_path / "out", overwrite=True, skip_existing=True)


def test_a_second_prediction_into_a_folder_is_refused_and_touches_nothing(tmp_path, refiner):
    path, out = photo(tmp_path / "in" / "a.png"), tmp_path / "out"
    with locked(out, "predict"):
        before = contents(tmp_path)
        with pytest.raises(LockedError, match=r"predict .* writes there"):
            predict([path], refiner, out, overwrite=True)
        assert contents(tmp_path) == before
    assert not predict([path], refiner, out).failures
    assert names(out) == ["a.png"]


def test_a_prediction_holds_the_lock(tmp_path, refiner):
    path, refusals = photo(tmp_path / "in" / "a.png"), []

    def second(_):
        with pytest.raises(LockedError) as caught:
            predict([path], refiner, tmp_path / "out", overwrite=True)
        refusals.append(caught.value)

    predict([path], refiner, tmp_path / "out", seen=second)
    assert len(refusals) == 1


def test_leftovers_of_killed_runs_are_swept_where_it_writes(tmp_path, refiner):
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "in" / "sub" / "b.png")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = re.sub(r"-[0-9]+-", f"-{ended.pid}-", temporary_name())
    out = tmp_path / "out"
    for folder in (out, out / "sub", out / "other"):
        folder.mkdir()
        (folder / name).touch()
    predict([tmp_path / "in"], refiner, out)
    assert names(out) == ["a.png", f"other/{name}", "sub/b.png"]


def test_outputs_that_vanish_are_failures(tmp_path, refiner):
    for name in ("a.jpg", "b.jpg"):
        photo(tmp_path / "in" / name)
    out = tmp_path / "out"
    report = predict([tmp_path / "in"], refiner, out, seen=lambda done: (out / "a.png").unlink(missing_ok=True))
    assert report.written == (out / "b.png",)
    assert only(report).name.endswith("a.jpg")
    assert "gone" in only(report).reason


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_ends_the_run(tmp_path, refiner, monkeypatch, code):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        photo(tmp_path / "in" / name)
    written = []

    def full(file, *arguments):
        if written:
            raise OSError(code, os.strerror(code), str(file))
        save_png(file, *arguments)
        written.append(file)

    monkeypatch.setattr("sparserefine.inference.predict.save_png", full)
    report = predict([tmp_path / "in"], refiner, tmp_path / "out")
    assert names(tmp_path / "out") == ["a.png"]
    assert only(report).name.endswith("b.jpg")
    assert f"b.png: cannot be written ({os.strerror(code)})" in only(report).reason
    assert [path.name for path in report.not_tried] == ["c.jpg", "d.jpg"]
    assert report.summary().endswith(", 1 failure, 2 not tried")


@pytest.mark.parametrize("inputs", ["", [""], ["a.png", ""]], ids=str)
def test_empty_paths_are_refused(tmp_path, refiner, monkeypatch, inputs):
    photo(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="inputs: an empty path; is a shell variable unset"):
        predict(inputs, refiner, "out")
    with pytest.raises(ValueError, match="out: an empty path"):
        predict("a.png", refiner, "")
    assert names(tmp_path) == ["a.png"]


def test_what_is_no_file_is_a_failure_that_says_so(tmp_path, refiner):
    root = tmp_path / "in"
    photo(root / "a.png")
    os.mkfifo(root / "fifo.png")
    for inputs in ([root], [f"{root}/*"], [root / "a.png", root / "fifo.png"]):
        report = predict(inputs, refiner, tmp_path / "out", overwrite=True)
        assert len(report.images) == 1
        assert only(report).name.endswith("fifo.png")
        assert only(report).reason.startswith("is a FIFO")
    assert "is a character device" in only(predict(["/dev/null"], refiner, tmp_path / "out")).reason


def test_names_are_printed_on_one_line(tmp_path, refiner):
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b\n\x1b[31m.png").write_bytes(b"")
    failure = only(predict([tmp_path / "in"], refiner, tmp_path / "out"))
    assert failure.name.endswith("b\n\x1b[31m.png")
    assert failure.reason.startswith("not a readable image")
    assert str(failure).isprintable()
    assert r"b\n\x1b[31m.png: not" in str(failure)


@pytest.fixture
def command(monkeypatch, refiner):
    """Runs ``sparserefine predict`` with the tiny refiner."""
    monkeypatch.setattr("sparserefine.commands.predict.refiner_of", lambda *_, **options: refiner)
    return lambda *arguments: main(["predict", *map(str, arguments), "--refiner", "demo", "--device", "cpu"])


def test_an_interrupted_command_says_what_was_done(tmp_path, monkeypatch, capsys, command):
    for name in ("a.jpg", "b.jpg"):
        photo(tmp_path / "in" / name)

    def interrupted(path, config):
        if path.name == "b.jpg":
            raise KeyboardInterrupt
        return read_pixels(path, config)

    with monkeypatch.context() as patch:
        patch.setattr("sparserefine.inference.predict.read_pixels", interrupted)
        assert command(tmp_path / "in", "--out", tmp_path / "out") == 130
    assert "1 image predicted before the interruption\n" in capsys.readouterr().err
    assert "--skip_existing" in HOW_TO_GO_ON
    assert command(tmp_path / "in", "--out", tmp_path / "out", "--skip_existing") == 0
    assert capsys.readouterr().out.endswith(", 1 present already\n")


def test_a_command_on_a_full_disk_fails_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, command):
    for name in ("a.jpg", "b.jpg"):
        photo(tmp_path / "in" / name)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparserefine.inference.predict.save_png", full)
    assert command(tmp_path / "in", "--out", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert printed.out == "0 images predicted, 1 failure, 1 not tried\n"
    assert printed.err.count("\n") == 2
    assert "--skip_existing" in printed.err


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("stop", range(1, 5))
def test_an_interruption_at_any_rename_leaves_old_or_new_labels(tmp_path, refiner, monkeypatch, overlay, stop):
    """After each rename the folder is synced: there too."""
    image, out = photo(tmp_path / "a.png"), tmp_path / "out"
    predict([image], refiner, out, overlay=overlay)
    old = (out / "a.png").read_bytes()
    left, sync, rename = [stop], whole._sync_folder, Path.replace

    def interrupting(happens):
        def wrapped(*arguments):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return happens(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(whole, "_sync_folder", interrupting(sync))
        patch.setattr(Path, "replace", interrupting(rename))
        with suppress(KeyboardInterrupt):
            predict([image], refiner, out, overlay=overlay, overwrite=True)
    assert (out / "a.png").read_bytes() == old  # the same image gives the same labels
    predict([image], refiner, out, overlay=overlay, skip_existing=True)
    assert names(out) == (["a.png", "a_overlay.png"] if overlay else ["a.png"])


def test_a_command_with_an_unset_variable_is_refused(tmp_path, monkeypatch, capsys, command):
    photo(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert command("", "--out", "out") == 2
    assert "is a shell variable unset?" in capsys.readouterr().err
    assert names(tmp_path) == ["a.jpg"]


def test_the_overlay_shows_background_as_the_image_has_it(tmp_path, refiner):
    path = photo(tmp_path / "a.png")
    labels, shown = predict([path], refiner, tmp_path / "out", overlay=True).images[0].outputs
    assert shown.name == "a_overlay.png"
    image, label, picture = read_image(path), read_label(labels), read_image(shown)
    assert 0 < (label == 0).sum() < label.numel()
    assert torch.equal(picture[:, label == 0], image[:, label == 0])
    colours = torch.tensor(CLASSES.palette, dtype=torch.float)[label].permute(2, 0, 1)
    off = picture.float() - (image + colours) / 2
    assert off[:, label > 0].abs().max() <= 0.5


def test_predicts_in_evaluation_mode_and_leaves_the_refiner_as_it_was(tmp_path):
    refiner = tiny_refiner()
    path = photo(tmp_path / "a.png")
    expected = read_label(predict([path], refiner, tmp_path / "eval").written[0])
    before = {name: value.clone() for name, value in refiner.state_dict().items()}
    refiner.train()
    labels = read_label(predict([path], refiner, tmp_path / "train").written[0])
    assert torch.equal(labels, expected)
    assert refiner.training
    assert refiner.extractor.training
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())
    assert not any(p.is_inference() for p in refiner.parameters())


def test_records_no_gradients_so_that_packed_networks_run(tmp_path):
    refiner, recorded = tiny_refiner(), []
    refiner.extractor.head.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    predict([photo(tmp_path / "a.png")], refiner, tmp_path / "out")
    assert not any(recorded)


def test_quick_runs_print_nothing(tmp_path, refiner, capfd):
    predict([photo(tmp_path / "a.png")], refiner, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_names_do_not_depend_on_the_order_of_the_inputs(tmp_path, refiner):
    paths = [photo(tmp_path / "in" / name) for name in ("a.jpg", "a.tif", "a_jpg.bmp")]
    predict(paths, refiner, tmp_path / "out")
    first = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    predict(paths[::-1], refiner, tmp_path / "out")
    assert contents(tmp_path / "out") == first


def test_a_failure_reads_as_a_line():
    assert str(Failure("a.png", "no such file")) == "a.png: no such file"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_where_the_refiner_is(tmp_path):
    refiner = tiny_refiner().cuda()
    assert not predict([photo(tmp_path / "a.png")], refiner, tmp_path / "out").failures


def test_info_names_what_a_bug_report_needs():
    entries = info()
    assert {"sparserefine", "python", "torch", "devices", "cpu", "lightning", "huggingface_hub", "bases"} <= set(
        entries
    )
    assert torch.__version__ in entries["torch"]
    assert entries["devices"].startswith("cpu")
    assert "unet:" in entries["bases"]
    lines = info_text().splitlines()
    assert len(lines) == len(entries)
    assert all(
        line.startswith(name) and line.endswith(text) for line, (name, text) in zip(lines, entries.items(), strict=True)
    )


def test_info_says_how_to_get_what_is_missing(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sparserefine.commands.info.version", absent)
    assert "pip install 'sparserefine[train]'" in info()["lightning"]
    assert "pip install 'sparserefine[hub]'" in info()["huggingface_hub"]
