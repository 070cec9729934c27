"""The paper's data sets in the form in which they come: names, preparation that goes on, lists of sets, trials."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from nofa_nb.apps import cli
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import VideoWriter, load_tensors, save_tensors
from nofa_nb.data.preprocess import read_clip_folder
from nofa_nb.evaluation.datasets import (
    DATASETS,
    dataset_files,
    dataset_trials,
    draw_list,
    folder_trials,
    person_of,
    prepare_dataset,
    prepare_photos,
    prepared_sets,
    read_list,
    write_list,
)
from nofa_nb.experts.face3d import FaceParameters
from nofa_nb.experts.landmarks import Detection
from nofa_nb.geometry.cameras import Camera

pytestmark = pytest.mark.usefixtures("one_thread")
FRACTIONS = torch.tensor([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])


def detector(image):
    "A face in the middle of whatever is not dark."
    if image.mean() < 60:
        return []
    h, w = image.shape[:2]
    box = torch.tensor([w * 0.25, h * 0.25, w * 0.75, h * 0.75])
    return [Detection(box, box[:2] + FRACTIONS * (box[2:] - box[:2]), 0.99)]


def m(image):
    n = len(image)
    return FaceParameters(
        image.new_zeros(n, 100), image.mean((1, 2, 3))[:, None].expand(-1, 52), Camera.orbit(torch.zeros(n))
    )


def picture(grey, size=64):
    return np.full((size, size, 3), grey, np.uint8) + np.arange(size, dtype=np.uint8)[:, None]


def photo(path, grey=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(grey)).save(path)


def video(path, frames=4, dark=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 25, (64, 64)) as out:
        for k in range(frames):
            out.write(np.zeros((64, 64, 3), np.uint8) if k in dark else picture(90 + 5 * k))


def pictures(folder, frames=4):
    for k in range(frames):
        photo(folder / f"{k:08d}.png", 90 + 5 * k)


# Each set as it comes (nbs/evaluation/datasets.ipynb says where that is written): what is laid down, what of it is
# prepared, who that is. Names are the sets' own.
FORMS = {
    "HDTF": (
        ["WDA_ChrisMurphy0_000.mp4", "WDA_ChrisMurphy1_000.mp4", "RD_Radio11_001.mp4", "_videos_raw/RD_Radio11.mp4"],
        {"WDA_ChrisMurphy0_000": "ChrisMurphy", "WDA_ChrisMurphy1_000": "ChrisMurphy", "RD_Radio11_001": "Radio11"},
    ),
    "VFHQ": (
        [
            "Clip+_HebIzK_LP4+P2+C1+F16589-16715/",
            "Clip+y5OFsRIRkwc+P0+C0+F9797-9938/",
            "Clip+y5OFsRIRkwc+P0+C1+F1-9.mp4",
            "meta/Clip+y5OFsRIRkwc+P0+C0+F9797-9938.txt",
        ],
        {
            "Clip+_HebIzK_LP4+P2+C1+F16589-16715": "_HebIzK_LP4+P2",
            "Clip+y5OFsRIRkwc+P0+C0+F9797-9938": "y5OFsRIRkwc+P0",
            "Clip+y5OFsRIRkwc+P0+C1+F1-9": "y5OFsRIRkwc+P0",
        },
    ),
    "FFHQ": (
        ["00000/00000.png", "00000/00001.png", "01000/01000.png", "LICENSE.txt"],
        {n: n for n in ("00000", "00001", "01000")},
    ),
    "LPFF": (
        [
            "100004356@N06_21795165006_01.png",
            "100004356@N06_21795165006_02.png",
            "30863942@N00_2165775309_12.jpg",
            "info.json",
        ],
        {n: n for n in ("100004356@N06_21795165006_01", "100004356@N06_21795165006_02", "30863942@N00_2165775309_12")},
    ),
    "CelebV-HQ": (
        ["M2Ohb0FAaJU_1.mp4", "-GHMHbLRtJg_47_0.mp4", "-GHMHbLRtJg_48_0.mp4"],
        {"M2Ohb0FAaJU_1": "M2Ohb0FAaJU", "-GHMHbLRtJg_47_0": "-GHMHbLRtJg", "-GHMHbLRtJg_48_0": "-GHMHbLRtJg"},
    ),
    "VoxCeleb": (
        [
            "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
            "dev/mp4/id00012/2DLq_Kkc1r8/00001.mp4",
            "dev/mp4/id00015/0fijmz4vTVU/00001.mp4",
            "dev/aac/id00015/0fijmz4vTVU/00001.m4a",
        ],
        {
            "id00012_21Uxsk56VDQ_00001": "id00012",
            "id00012_2DLq_Kkc1r8_00001": "id00012",
            "id00015_0fijmz4vTVU_00001": "id00015",
        },
    ),
}


def lay(dataset, root):
    "A miniature of a data set."
    for name in FORMS[dataset][0]:
        path = root / name
        if name.endswith("/"):
            pictures(path)
        elif path.suffix == ".mp4":
            video(path)
        elif path.suffix in (".png", ".jpg"):
            photo(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def ready(dataset, root, **settings):
    "A miniature, prepared."
    place = root / "prepared" / dataset
    run = {"framing": "eg3d", "size": 16, "progress": False} | settings
    return place, prepare_dataset(dataset, lay(dataset, root / "raw" / dataset), place, detector, m, **run)


def test_every_set_has_a_form():
    assert set(FORMS) == set(DATASETS)


@pytest.mark.parametrize("dataset", FORMS)
def test_each_set_in_the_form_in_which_it_comes(dataset, tmp_path):
    people = FORMS[dataset][1]
    place, outcomes = ready(dataset, tmp_path)
    assert list(dataset_files(dataset, tmp_path / "raw" / dataset)) == sorted(people)
    assert {n: person_of(dataset, n) for n in people} == people
    assert [o.status for o in outcomes] == ["done"] * 3
    assert prepared_sets(place) == {dataset: place}
    listed = draw_list({dataset: place}, len(set(people.values())))
    assert sorted(person_of(dataset, e.name) for e in listed.entries) == sorted(set(people.values()))
    with pytest.raises(InputError, match="count must be at most"):
        draw_list({dataset: place}, len(set(people.values())) + 1)
    if DATASETS[dataset].kind == "videos":
        trials, manifest, skipped = dataset_trials(place, "self", 16)
        assert (
            len(trials) == len(set(people.values()))
            and not skipped
            and manifest == draw_list({dataset: place}, 40, fewer=True).sha256
        )
        assert trials[0].source().index == (0,) and [i for f in trials[0].drive() for i in f.index] == [1, 2, 3]
    else:
        drivers, _ = ready("HDTF", tmp_path)
        trials, manifest, _ = dataset_trials([place, drivers], "cross", 16)
        assert len(trials) == 3 and not trials[0].same and len(next(trials[0].drive())) == 3
        assert manifest not in (listed.sha256, dataset_trials([place, drivers], "self", 16).manifest_hash)
    assert {o.status for o in ready(dataset, tmp_path)[1]} == {"skipped"}


def test_a_wrong_folder_is_named(tmp_path):
    lay("VFHQ", tmp_path / "a" / "GT"), lay("VFHQ", tmp_path / "a" / "Blind")
    with pytest.raises(InputError, match="more than once: name the folder that holds one version"):
        dataset_files("VFHQ", tmp_path / "a")
    with pytest.raises(MissingResource, match="VoxCeleb in .* is missing: get it from https://www.robots.ox.ac.uk"):
        dataset_files("VoxCeleb", tmp_path / "a")
    place, _ = ready("FFHQ", tmp_path)
    with pytest.raises(InputError, match="of FFHQ"):
        prepare_dataset("LPFF", lay("LPFF", tmp_path / "lpff"), place, detector, m, 16, framing="eg3d", progress=False)
    with pytest.raises(MissingResource, match="dataset.json"):
        prepared_sets(tmp_path)


def test_a_number_of_different_people_is_drawn(tmp_path):
    place, outcomes = ready("HDTF", tmp_path, count=2)
    assert {person_of("HDTF", o.name) for o in outcomes} == {"ChrisMurphy", "Radio11"}
    other = {
        tuple(
            o.name
            for o in prepare_dataset(
                "FFHQ", lay("FFHQ", tmp_path / "f"), tmp_path / f"f{k}", detector, m, 16, None, "eg3d", 1, k, False
            )
        )
        for k in range(4)
    }
    assert len(other) > 1


def test_photos_go_on_where_they_were_stopped(tmp_path):
    files = [tmp_path / f"{k}.png" for k in range(5)]
    for k, path in enumerate(files):
        photo(path, 0 if k == 1 else 80 + 10 * k)
    seen, out, part = [], tmp_path / "out", tmp_path / ".out.part"

    def killed_at(n):
        def ask(image):
            seen.append(1)
            if len(seen) == n:
                raise KeyboardInterrupt
            return m(image)

        return ask

    run = lambda ask, **kw: prepare_photos(files, out, detector, ask, 16, "eg3d", False, **kw)
    with pytest.raises(KeyboardInterrupt):
        run(killed_at(3))  # asked of photos 0, 2, 3: the last of them is lost
    assert not out.exists() and sorted(p.name for p in (part / "work").glob("*.jpg")) == ["000000.jpg", "000002.jpg"]
    kept = (part / "work" / "000002.jpg").read_bytes()
    stamps = [(part / "work" / f"{k:06d}.jpg").stat().st_mtime_ns for k in (0, 2)]
    seen.clear()
    assert [o.status for o in run(killed_at(0))] == ["done", "failed", "done", "done", "done"]
    assert len(seen) == 2 and not part.exists()  # photos 3 and 4 only
    clip = read_clip_folder(out)
    assert clip.record["names"] == ["0", "2", "3", "4"] and clip.time.tolist() == [0, 1, 2, 3] and clip.found.all()
    assert (out / "frames" / "000001.jpg").read_bytes() == kept
    assert [(out / "frames" / f"{j:06d}.jpg").stat().st_mtime_ns for j in (0, 1)] == stamps
    assert sorted(p.name for p in out.iterdir()) == [
        "clip.json",
        "frames",
        "labels.safetensors",
        "pictures.json",
        "report.json",
    ]
    whole = tmp_path / "whole"
    prepare_photos(files, whole, detector, m, 16, "eg3d", False)
    assert read_clip_folder(whole).sha256 == clip.sha256  # the same as in one go
    seen.clear()
    assert [o.status for o in run(killed_at(0))] == ["skipped", "failed", "skipped", "skipped", "skipped"] and not seen
    photo(files[3], 7)
    with pytest.raises(InputError, match="the same photos"):
        run(killed_at(0))


@pytest.mark.parametrize("stopped", ["os.replace", "write_json", "shutil.rmtree"])
def test_photos_go_on_at_their_end(tmp_path, monkeypatch, stopped):
    "Killed while the finished photos become a folder, at each of its steps."
    import nofa_nb.evaluation.datasets as module

    files = [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(files):
        photo(path, 80 + 10 * k)
    owner, name = (
        (getattr(module, stopped.split(".")[0]), stopped.split(".")[1]) if "." in stopped else (module, stopped)
    )
    real, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(Path(args[0]).as_posix())
        late = {
            "os.replace": calls[-1].endswith("work/000001.jpg"),
            "write_json": calls[-1].endswith("clip.json"),
            "shutil.rmtree": calls[-1].endswith("work"),
        }[stopped]
        if late:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    run = lambda: prepare_photos(files, tmp_path / "out", detector, m, 16, "eg3d", False)
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert [o.status for o in run()] == ["done"] * 3
    prepare_photos(files, tmp_path / "whole", detector, m, 16, "eg3d", False)
    assert read_clip_folder(tmp_path / "out").sha256 == read_clip_folder(tmp_path / "whole").sha256
    assert all(read_clip_folder(tmp_path / "out").image(k).shape == (3, 16, 16) for k in range(3))


def test_photos_without_a_face(tmp_path):
    photo(tmp_path / "a.png", 0)
    for _ in range(2):
        with pytest.raises(InputError, match="with a face in at least one, got none in 1"):
            prepare_photos([tmp_path / "a.png"], tmp_path / "out", detector, m, 16, "eg3d", False)
        assert not (tmp_path / ".out.part").exists()


def test_sets_together_have_one_manifest(tmp_path):
    places = [ready(n, tmp_path)[0] for n in ("HDTF", "VFHQ")]
    trials, manifest, _ = dataset_trials(places, "self", 16, 2)
    assert [t.name.split("-")[0] for t in trials] == ["HDTF", "VFHQ", "HDTF", "VFHQ"] and len(
        {t.unit for t in trials}
    ) == 4
    assert manifest == dataset_trials(places[::-1], "self", 16, 2).manifest_hash
    assert (
        manifest
        != dataset_trials(places[0], "self", 16, 2).manifest_hash
        != dataset_trials(places[1], "self", 16, 2).manifest_hash
    )
    listed = draw_list(prepared_sets(places), 4)
    write_list(tmp_path / "list.json", listed)
    assert read_list(tmp_path / "list.json") == listed and listed.sha256 == manifest
    text = (tmp_path / "list.json").read_text()
    (tmp_path / "list.json").write_text(text.replace("VFHQ", "HDTF"))
    with pytest.raises(InputError, match="as it was written"):
        read_list(tmp_path / "list.json")
    with pytest.raises(InputError, match="all of videos or all of photos"):
        draw_list({"HDTF": places[0], "FFHQ": ready("FFHQ", tmp_path)[0]}, 1)
    assert dataset_trials(places, "self", 16, limit=1).manifest_hash == manifest
    assert dataset_trials(places, "self", 16, frames=3).manifest_hash != manifest


def test_photos_are_driven_by_clips(tmp_path):
    places = [ready(n, tmp_path)[0] for n in ("HDTF", "FFHQ")]
    trials, manifest, skipped = dataset_trials(places, "cross", 16, 2)
    assert sorted(t.unit for t in trials) == ["00000", "00001", "01000"] and not skipped
    assert not any(t.same for t in trials) and manifest != dataset_trials(places, "self", 16, 2).manifest_hash
    for t in trials:
        (frames,) = t.drive()
        assert len(t.source()) == 1 and frames.index == (1, 3) and frames.mask is None
        # M of this file says how bright a picture is: the labels are those of these very frames
        torch.testing.assert_close(frames.beta[:, 0], frames.image.mean((1, 2, 3)), atol=0.05, rtol=0)
    with pytest.raises(InputError, match="a set of photos for cross-reenactment"):
        dataset_trials(places[0], "cross", 16)


@pytest.mark.parametrize("what", ["picture", "labels", "hashes"])
def test_what_was_changed_since_is_refused(tmp_path, what):
    place, _ = ready("HDTF", tmp_path)
    sets = {"HDTF": place}
    listed = draw_list(sets, 2)
    trial = folder_trials(sets, listed, 16).trials[0]
    list(trial.drive()), trial.source()
    folder = place / listed.entries[0].folder
    if what == "picture":
        Image.fromarray(picture(10, 16)).save(folder / "frames" / "000002.jpg")
        trial.source()  # another frame
    elif what == "labels":
        labels, _ = load_tensors(folder / "labels.safetensors")
        save_tensors(folder / "labels.safetensors", labels | {"beta": labels["beta"] + 1})
    else:
        hashes = json.loads((folder / "pictures.json").read_text())
        (folder / "pictures.json").write_text(json.dumps(hashes[::-1]))
    with pytest.raises(InputError, match="the picture that was prepared" if what == "picture" else "those of the list"):
        list(trial.drive())


def test_a_clip_without_a_face_in_the_chosen_frames_is_left_out(tmp_path):
    folder = tmp_path / "hdtf"
    video(folder / "WDA_AnnOne_0.mp4", 8, dark=range(2, 8))
    video(folder / "WDA_BobTwo_0.mp4", 8)
    prepare_dataset("HDTF", folder, tmp_path / "out", detector, m, 16, framing="eg3d", progress=False)
    # a stride of 6 chooses frame 3; frame 1 has a face and is not chosen
    trials, manifest, skipped = dataset_trials(tmp_path / "out", "self", 16, 6)
    assert (
        [t.unit for t in trials] == ["BobTwo"]
        and len(skipped) == 1
        and "WDA_AnnOne_0 of HDTF is left out: it shows no face" in skipped[0]
    )
    assert list(trials[0].drive())[0].index == (3,)
    both = dataset_trials(tmp_path / "out", "self", 16, 1)
    assert len(both.trials) == 2 and not both.skipped and both.manifest_hash == manifest
    shutil.rmtree(tmp_path / "out" / "WDA_BobTwo_0")
    with pytest.raises(InputError, match="with a clip that can be tested, got WDA_AnnOne_0 of HDTF is left out"):
        dataset_trials(tmp_path / "out", "self", 16, 6)


def test_only_the_first_frames_are_looked_at(tmp_path):
    place = tmp_path / "out"
    video(tmp_path / "hdtf" / "WDA_AnnOne_0.mp4", 9)
    prepare_dataset("HDTF", tmp_path / "hdtf", place, detector, m, 16, framing="eg3d", progress=False)
    index = lambda **kw: [i for f in dataset_trials(place, "self", 16, **kw).trials[0].drive() for i in f.index]
    assert index(frames=5) == [1, 2, 3, 4] and index() == list(range(1, 9)) and index(stride=3, frames=6) == [1, 4]


def test_the_command(tmp_path, monkeypatch, capsys):
    "With the real detector and a real face; M is a stub."
    (tmp_path / "ffhq" / "00000").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(tmp_path / "ffhq" / "00000" / "00000.png")
    Image.fromarray(data.coffee()).save(tmp_path / "ffhq" / "00000" / "00001.png")
    asked = []
    monkeypatch.setattr("nofa_nb.experts.face3d.load_face3d", lambda *a: asked.append(a) or m)
    run = lambda *more: cli.main(
        ["evaluate", "prepare", "FFHQ", str(tmp_path / "ffhq"), str(tmp_path / "out"), "--size", "32", *more]
    )
    assert run() == 0
    told = capsys.readouterr().out
    assert "1 done, 0 there before, 1 failed" in told and "00001.png" in told and asked == [("paper", "deep3d")]
    clip = read_clip_folder(tmp_path / "out")
    assert clip.record["names"] == ["00000"] and clip.record["framing"] == "eg3d" and clip.image(0).shape == (3, 32, 32)
    assert run() == 0 and "0 done, 1 there before, 1 failed" in capsys.readouterr().out
    assert (
        run("--preset", "small") == 2
        and "the same framing" in capsys.readouterr().err
        and asked[-1] == ("small", "world")
    )
    assert cli.main(["evaluate", "prepare", "HDTF", str(tmp_path / "ffhq"), str(tmp_path / "x")]) == 3
    assert "github.com/MRzzm/HDTF" in capsys.readouterr().err
    (tmp_path / "hdtf").mkdir()
    (tmp_path / "hdtf" / "WDA_AnnOne_0.mp4").write_text("no video")
    assert cli.main(["evaluate", "prepare", "HDTF", str(tmp_path / "hdtf"), str(tmp_path / "x")]) == 2
