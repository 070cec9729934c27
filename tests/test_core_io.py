"Files: what is written comes back, what is broken is refused, and nothing is ever half-written."

import errno
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import (
    VideoReader,
    VideoWriter,
    atomic_path,
    load_arrays,
    load_tensors,
    read_audio,
    read_image,
    read_image_alpha,
    read_json,
    read_wave,
    save_arrays,
    save_tensors,
    write_image,
    write_json,
    write_wave,
)

IMAGE = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
FRAMES = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8), 8, 1), 8, 2)
TONE = (0.3 * np.sin(np.arange(8000) / 8000 * 2 * np.pi * 220)).astype(np.float32)


def video(path, frames=FRAMES, fps=25, audio=None):
    with VideoWriter(path, fps, frames[0].shape[:2], audio) as out:
        for f in frames:
            out.write(f)
    return path


WRITERS = {
    "a.png": lambda p: write_image(p, IMAGE),
    "a.jpg": lambda p: write_image(p, IMAGE),
    "a.wav": lambda p: write_wave(p, TONE, 8000),
    "a.mp4": lambda p: video(p, audio=(TONE, 8000)),
    "a.safetensors": lambda p: save_tensors(p, {"w": torch.rand(20_000)}),
    "a.npz": lambda p: save_arrays(p, {"x": np.random.default_rng(0).random(20_000)}),
    "a.json": lambda p: write_json(p, list(range(20_000))),
}


# --- faults of writing


@pytest.mark.parametrize("name", WRITERS)
def test_writers_make_folders_and_leave_one_file(tmp_path, name):
    WRITERS[name](tmp_path / "new" / "folder" / name)
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_refused_by_the_system(tmp_path, monkeypatch, name, code):
    (tmp_path / name).write_text("old")

    def refuse(source, target):
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=os.strerror(code)) as error:
        WRITERS[name](tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize("name", WRITERS)
def test_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        WRITERS[name](tmp_path / "file" / name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="got the folder"):
        WRITERS[name](tmp_path / "folder" / name)


def test_really_full(tmp_path):
    "A limit on the size of files stands in for a full disk: the writes themselves fail."
    code = f"""
import resource, sys, errno, os
sys.path.insert(0, {os.path.dirname(__file__)!r})
import pathlib, numpy as np
import test_core_io as t
from nofa_nb.core.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
for name, write in t.WRITERS.items():
    try: write(pathlib.Path({str(tmp_path)!r})/name)
    except InputError as e: print(name, os.strerror(errno.EFBIG) in str(e))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:-1] == [f"{n} True" for n in WRITERS], done.stderr
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle(tmp_path):
    code = f"""
import os, numpy as np
from nofa_nb.core.io import VideoWriter
with VideoWriter({str(tmp_path / "a.mp4")!r}, 25, (32, 48)) as out:
    for i in range(30): out.write(np.zeros((32, 48, 3), np.uint8))
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert not (tmp_path / "a.mp4").exists()
    video(tmp_path / "a.mp4")  # and the next run is not disturbed
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 12


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MissingResource])
def test_exceptions_pass_unchanged_and_leave_nothing(tmp_path, error):
    with pytest.raises(error, match="mine"), VideoWriter(tmp_path / "a.mp4", 25, (32, 48), (TONE, 8000)) as out:
        out.write(FRAMES[0])
        raise error("mine")
    with pytest.raises(error, match="mine"), atomic_path(tmp_path / "a.txt") as p:
        p.write_text("half")
        raise error("mine")
    assert not list(tmp_path.iterdir())


def test_foreign_file_error_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), atomic_path(tmp_path / "a.txt"):
        open(tmp_path / "absent")


# --- images


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]), st.integers(0, 2**16))
def test_png_round_trip(tmp_path_factory, h, w, channels, seed):
    path = tmp_path_factory.getbasetemp() / "round.png"
    image = torch.rand(channels, h, w, generator=torch.Generator().manual_seed(seed))
    write_image(path, image)
    colour, alpha = read_image_alpha(path)
    assert colour.shape == (3, h, w) and (colour - image[:3]).abs().max() <= 0.5 / 255 + 1e-6
    assert (alpha - (image[3:] if channels == 4 else 1)).abs().max() <= 0.5 / 255 + 1e-6


def stored(path, mode):
    rgb = Image.fromarray((IMAGE.permute(1, 2, 0) * 255).round().byte().numpy())
    rgb.convert(mode).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))
    return rgb


@pytest.mark.parametrize(
    "mode, name, tolerance", [("RGB", "a.png", 0), ("RGBA", "a.png", 0), ("RGB", "a.bmp", 0), ("CMYK", "a.tif", 1)]
)
def test_colour_modes(tmp_path, mode, name, tolerance):
    rgb = stored(tmp_path / name, mode)
    expected = np.asarray(rgb, np.float32).transpose(2, 0, 1) / 255
    assert np.abs(read_image(tmp_path / name).numpy() - expected).max() <= tolerance / 255 + 1e-6


@pytest.mark.parametrize(
    "mode, name", [("L", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("1", "a.png"), ("L", "a.jpg")]
)
def test_grey_and_palette_modes(tmp_path, mode, name):
    rgb = stored(tmp_path / name, mode)
    expected = np.asarray(rgb.convert(mode).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert np.abs(read_image(tmp_path / name).numpy() - expected).max() <= (3 if "jpg" in name else 0) / 255 + 1e-6


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey(tmp_path, order):
    values = np.array([[0, 257, 258], [30000, 30001, 65535]])
    Image.fromarray(values.astype(order)).save(tmp_path / "a.tif")
    expected = torch.from_numpy(values / 65535).float().expand(3, 2, 3)
    torch.testing.assert_close(read_image(tmp_path / "a.tif"), expected, atol=1e-7, rtol=0)


def test_transparent_palette_and_background(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").permute(1, 2, 0).tolist() == [[[1, 0, 0], [1, 1, 1]]]
    assert read_image(tmp_path / "a.png", (0, 1, 0)).permute(1, 2, 0).tolist() == [[[1, 0, 0], [0, 1, 0]]]
    with pytest.raises(InputError, match="background"):
        read_image(tmp_path / "a.png", 255)


def test_exif_orientation_of_a_phone(tmp_path):
    "Orientation 6: stored lying, the top of the scene at the right edge of the sensor."
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255  # top left as stored is top right when upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 6, 4) and image[0, 0, 3] == 1 and image.sum() == 3


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_cut_and_corrupt_images(tmp_path, name):
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for data in (whole[: -len(whole) // 3], whole[:20], b"", bytes(100), b"<svg/>"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="cannot read the image"):
            read_image(tmp_path / name)


def test_floating_point_image_is_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("read", [read_image, read_wave, read_audio, VideoReader, load_tensors, load_arrays, read_json])
def test_absent_files_and_folders(tmp_path, read):
    with pytest.raises(MissingResource, match="absent.x"):
        read(tmp_path / "absent.x")
    with pytest.raises(InputError, match="folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    "path, image, told",
    [
        ("a.gif", IMAGE, "path"),
        ("a", IMAGE, "path"),
        ("a.png", IMAGE[0], "c, h, w"),
        ("a.png", IMAGE[:2], "image"),
        ("a.jpg", torch.rand(4, 2, 2), "JPEG"),
        ("a.png", IMAGE * torch.nan, "finite"),
        ("a.png", IMAGE[:, :0], "image"),
        ("a.png", (IMAGE * 255).int(), "floating point"),
    ],
)
def test_bad_images_are_not_written(tmp_path, path, image, told):
    with pytest.raises(InputError, match=told):
        write_image(tmp_path / path, image)
    assert not list(tmp_path.iterdir())


# --- sound


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(1, 96_000))
def test_wave_round_trip(tmp_path_factory, samples, rate):
    path = tmp_path_factory.getbasetemp() / "round.wav"
    write_wave(path, np.array(samples, np.float32), rate)
    back, got = read_wave(path)
    assert got == rate and np.abs(back - np.array(samples)).max() <= 1 / 32768


@pytest.mark.parametrize(
    "width, low, high", [(1, 0, 255), (2, -(2**15), 2**15 - 1), (3, -(2**23), 2**23 - 1), (4, -(2**31), 2**31 - 1)]
)
def test_pcm_widths_and_channels(tmp_path, width, low, high):
    with wave.open(str(tmp_path / "a.wav"), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(width)
        out.setframerate(100)
        for value in (low, low, high, high, low, high):
            out.writeframes(int(value).to_bytes(width, "little", signed=width > 1))
    samples, _ = read_wave(tmp_path / "a.wav")
    np.testing.assert_allclose(samples, [-1, 1, 0], atol=2.0 ** (1 - 8 * width) + 1e-7)


def test_bad_sound(tmp_path):
    for wrong, told in ((np.zeros((2, 3)), r"\(n,\)"), (np.zeros(0), "one sample"), (np.array([np.inf]), "finite")):
        with pytest.raises(InputError, match=told):
            write_wave(tmp_path / "a.wav", wrong, 8000)
    for rate in (0, -1, 0.5):
        with pytest.raises(InputError, match="rate"):
            write_wave(tmp_path / "a.wav", TONE, rate)
    write_wave(tmp_path / "a.wav", TONE, 8000)
    whole = (tmp_path / "a.wav").read_bytes()
    for data in (whole[:-10], whole[:50], whole[:30], b"", b"RIFF" + bytes(80)):
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(InputError):
            read_wave(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "b.wav"), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
    with pytest.raises(InputError, match="0 samples"):
        read_wave(tmp_path / "b.wav")


# --- video


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 12.5])
def test_video_round_trip(tmp_path, fps):
    reader = VideoReader(video(tmp_path / "a.mp4", fps=fps))
    frames = list(reader)
    assert reader.size == (32, 48) and reader.frames == len(frames) == 12 and abs(reader.fps - fps) < 1e-9
    assert np.abs(np.stack(frames).astype(int) - FRAMES).mean() < 14  # colour has half resolution
    np.testing.assert_allclose([t for t, _ in reader.timed()], np.arange(12) / fps, atol=1e-4)
    assert reader.audio() is None
    assert np.array_equal(next(iter(reader)), frames[0])  # starts again


def test_colours_survive(tmp_path):
    for colour in itertools.product((0, 255), repeat=3):
        frame = np.full((32, 32, 3), colour, np.uint8)
        back = next(iter(VideoReader(video(tmp_path / "a.mp4", [frame] * 2))))
        assert np.abs(back.astype(int) - frame).max() <= 4
    float_frame = torch.full((3, 32, 32), 0.5)
    with VideoWriter(tmp_path / "b.mp4", 25, (32, 32)) as out:
        out.write(float_frame)
    assert np.abs(next(iter(VideoReader(tmp_path / "b.mp4"))).astype(int) - 128).max() <= 1


@pytest.mark.parametrize("h, w", [(33, 48), (32, 47), (33, 47), (1, 1)])
def test_odd_sizes_are_padded(tmp_path, h, w):
    frame = np.full((h, w, 3), 200, np.uint8)
    reader = VideoReader(video(tmp_path / "a.mp4", [frame] * 3))
    assert reader.size == (h + h % 2, w + w % 2)
    assert np.abs(next(iter(reader)).astype(int) - 200).max() <= 3


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 7350])
def test_sound_is_kept_in_time(tmp_path, rate):
    "A click in the middle of a second stays there; sound stops with the pictures."
    samples = np.zeros(3 * rate, np.float32)
    samples[rate // 2 : rate // 2 + rate // 50] = 0.9
    reader = VideoReader(video(tmp_path / "a.mp4", np.repeat(FRAMES[:1], 25, 0), 25, (samples, rate)))
    sound, got = reader.audio()
    loud = np.flatnonzero(np.abs(sound) > 0.3) / got
    assert abs(loud.min() - 0.5) < 0.005 and abs(loud.max() - 0.52) < 0.005
    assert 1 <= len(sound) / got < 1.3


def test_short_sound_ends_early(tmp_path):
    reader = VideoReader(video(tmp_path / "a.mp4", np.repeat(FRAMES[:1], 50, 0), 25, (TONE, 8000)))
    assert reader.frames == 50 and abs(len(reader.audio()[0]) - 8000) <= 2048


def test_sound_that_starts_later_than_the_pictures(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        picture, sound = out.add_stream("libx264", rate=10), out.add_stream("pcm_s16le", rate=8000, layout="mono")
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        for _ in range(20):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        frame = av.AudioFrame.from_ndarray(np.full((1, 4000), 9000, np.int16), "s16", "mono")
        frame.sample_rate, frame.time_base, frame.pts = 8000, Fraction(1, 8000), 4000  # half a second late
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        out.mux(picture.encode(None))
    samples, rate = VideoReader(tmp_path / "a.mkv").audio()
    assert rate == 8000 and abs(np.flatnonzero(samples > 0.1)[0] - 4000) <= 8


def test_rotation_of_a_phone(tmp_path):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :16] = 255
    for degrees in (0, 90, 180, -90):
        with av.open(str(tmp_path / "a.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            if degrees:
                stream.set_display_rotation(degrees)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            out.mux(stream.encode(None))
        reader = VideoReader(tmp_path / "a.mp4")
        read = next(iter(reader))
        assert reader.size == read.shape[:2] == ((48, 32) if degrees % 180 else (32, 48))
        with av.open(str(tmp_path / "a.mp4")) as f:
            said = next(f.decode(video=0)).rotation  # counterclockwise
        assert abs(said) == abs(degrees)
        assert np.abs(read.astype(int) - np.rot90(frame, said // 90)).mean() < 3


def test_variable_frame_rate(tmp_path):
    ticks = [0, 1, 5, 6, 20, 50]
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=100)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in ticks:
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 4 * i, np.uint8), "rgb24")
            picture.pts, picture.time_base = i, Fraction(1, 100)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    for tick, (time, frame) in zip(ticks, VideoReader(tmp_path / "a.mkv").timed(), strict=True):
        assert abs(time - tick / 100) < 0.002 and abs(frame.mean() - 4 * tick) < 3


def test_memory_does_not_grow_with_length(tmp_path):
    frame = np.zeros((120, 160, 3), np.uint8)
    tracemalloc.start()
    try:
        with VideoWriter(tmp_path / "a.mp4", 25, (120, 160)) as out:
            for _ in range(150):
                out.write(frame)
        count = sum(1 for _ in VideoReader(tmp_path / "a.mp4"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 150 and peak < 15 * frame.nbytes  # of 150 frames


def test_cut_damaged_and_wrong_videos(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    whole = video(tmp_path / "a.mp4", noise).read_bytes()
    path = tmp_path / "b.mp4"
    for part in (0.01, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(InputError):
            VideoReader(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    with pytest.raises(InputError, match="after frame"):
        list(VideoReader(path))
    for data in (b"", b"text", bytes(5000)):
        path.write_bytes(data)
        with pytest.raises(InputError):
            VideoReader(path)
    write_wave(tmp_path / "a.wav", TONE, 8000)
    with pytest.raises(InputError, match="pictures"):
        VideoReader(tmp_path / "a.wav")


def test_zero_frames(tmp_path):
    with (
        pytest.raises(InputError, match="at least one frame"),
        VideoWriter(tmp_path / "a.mp4", 25, (32, 32), (TONE, 8000)),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with av.open(str(tmp_path / "b.mkv"), "w") as out:  # a stream without a picture
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.start_encoding()
    with pytest.raises(InputError):
        VideoReader(tmp_path / "b.mkv")


@pytest.mark.parametrize(
    "options, told",
    [
        (dict(path="a.avi"), "mp4"),
        (dict(fps=0), "fps"),
        (dict(fps=float("nan")), "fps"),
        (dict(size=(0, 4)), "size"),
        (dict(size=(4,)), "size"),
        (dict(audio=(np.zeros((2, 9)), 8000)), "wave"),
        (dict(audio=(TONE, 0)), "rate"),
    ],
)
def test_bad_video_settings(tmp_path, options, told):
    options = {**dict(path="a.mp4", fps=25, size=(32, 32)), **options}
    with pytest.raises(InputError, match=told):
        VideoWriter(tmp_path / options.pop("path"), **options)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((32, 32, 3)),
        torch.zeros(3, 30, 32),
        torch.full((3, 32, 32), torch.nan),
        torch.zeros(1, 3, 32, 32),
    ],
)
def test_bad_frames(tmp_path, frame):
    with pytest.raises(InputError, match="frame"), VideoWriter(tmp_path / "a.mp4", 25, (32, 32)) as out:
        out.write(frame)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="with"):
        VideoWriter(tmp_path / "a.mp4", 25, (32, 32)).write(np.zeros((32, 32, 3), np.uint8))


# --- tensors, arrays, JSON


def test_tensors_round_trip(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "w": base.T,
        "view": base[1:],
        "same": base[1:],
        "bf": base.bfloat16(),
        "n": torch.tensor(5),
        "none": torch.zeros(0, 2),
        "mask": base > 4,
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"config": json.dumps({"a": 1})})
    back, metadata = load_tensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys() and json.loads(metadata["config"]) == {"a": 1}
    for k, t in tensors.items():
        assert back[k].dtype == t.dtype and torch.equal(back[k], t)
    save_tensors(tmp_path / "a.safetensors", tensors, half=True)
    back, metadata = load_tensors(tmp_path / "a.safetensors")
    assert (
        metadata == {}
        and back["w"].dtype == torch.float16
        and back["n"].dtype == torch.int64
        and back["mask"].dtype == torch.bool
    )
    assert load_tensors(tmp_path / "a.safetensors", dtype=torch.float32)[0]["w"].dtype == torch.float32


def test_bad_tensors(tmp_path):
    for args, told in (
        (({"w": 3},), "tensor"),
        (({"w": IMAGE}, {"n": 3}), "string"),
        (({"w": torch.tensor(7e4)}, None, True), "65504"),
    ):
        with pytest.raises(InputError, match=told):
            save_tensors(tmp_path / "a.safetensors", *args)
    assert not list(tmp_path.iterdir())
    WRITERS["a.safetensors"](tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for data in (whole[:-1], whole[:10], b"", b"\x80\x04K\x01."):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="cannot read the tensors"):
            load_tensors(tmp_path / "a.safetensors")


def test_arrays_round_trip_and_pickles_are_refused(tmp_path):
    arrays = {"x": np.arange(6).reshape(2, 3), "names": np.array(["left", "right"]), "s": np.float32(2)}
    save_arrays(tmp_path / "a.npz", arrays, {"licence": "CC0-1.0", "sizes": [1, 2]})
    back, metadata = load_arrays(tmp_path / "a.npz")
    assert metadata == {"licence": "CC0-1.0", "sizes": [1, 2]} and back.keys() == arrays.keys()
    for k in arrays:
        np.testing.assert_array_equal(back[k], arrays[k])

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], object))
    with pytest.raises(InputError, match="plain arrays"):
        load_arrays(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(InputError, match="Python objects"):
        save_arrays(tmp_path / "b.npz", {"x": np.array([Trap()], object)})
    with pytest.raises(InputError, match="JSON"):
        save_arrays(tmp_path / "b.npz", {}, {"x": float("nan")})
    whole = (tmp_path / "a.npz").read_bytes()
    for data in (whole[:-30], whole[:40], b"", b"text", whole[:80] + bytes(40) + whole[120:]):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(InputError, match="cannot read the arrays"):
            load_arrays(tmp_path / "a.npz")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None, True], "x": np.int64(3), "a": np.eye(2)})
    assert read_json(tmp_path / "a.json") == {"ä": [1, 2.5, None, True], "x": 3, "a": [[1, 0], [0, 1]]}
    for value in (float("inf"), {"x": object()}, {"x": np.float32("nan")}):
        with pytest.raises(InputError, match="JSON"):
            write_json(tmp_path / "b.json", value)
    assert not (tmp_path / "b.json").exists()
    for data in (b"{", b"", b"\xff\xfe\x00"):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(InputError, match="JSON"):
            read_json(tmp_path / "a.json")


def test_no_tensors_and_no_metadata_can_be_read_again(tmp_path):
    save_tensors(tmp_path / "empty.safetensors", {})
    assert load_tensors(tmp_path / "empty.safetensors") == ({}, {})
