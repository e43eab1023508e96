"""mmdyt.OpenClip and mmdyt.DecodeClip: right frames, or an error that names the file."""

import os
import re
import struct
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import write_clip
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import DataLoader

from mmdyt import compat

compat.install()

from mmdyt.datasets import clips as clips_module  # noqa: E402
from mmdyt.datasets.clips import DecodeClip, OpenClip  # noqa: E402

READERS = ('decord', 'pyav')
DATA = Path(os.environ.get('MMDYT_DATA', '/nonexistent'))
LENGTH = 40
ALL = np.arange(LENGTH)
both_readers = pytest.mark.parametrize('reader', READERS)
BASE = {'type': 'mmaction.VideoDataset', 'test_mode': True}


@pytest.fixture(scope='module')
def frames() -> np.ndarray:
    """Frames that differ in all channels, and each from each: colours drift, and a bar moves over them."""
    frames = np.zeros((LENGTH, 64, 96, 3), np.uint8)
    for t in range(LENGTH):
        frames[t] = 200 - 4 * t, 30 + 2 * t, 5 * t
        frames[t, :, t : t + 8] = 255
    return frames


@pytest.fixture(scope='module')
def clip(tmp_path_factory, frames) -> Path:
    """The frames as MPEG-4 in an mp4 with its index at the end, a key frame every 12."""
    path = tmp_path_factory.mktemp('clip') / 'clip.mp4'
    write_clip(path, frames)
    return path


def remux(source: Path, target: Path, skip: int = 0, **options) -> Path:
    """The same packets in another container; the first frames, if any are skipped, come before time 0."""
    with av.open(str(source)) as old, av.open(str(target), 'w', options=options) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        offset = int(skip / 30 / stream.time_base)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
                new.mux(packet)
    return target


def encode(
    path: Path, frames: np.ndarray, codec: str = 'libx264', audio: bool = False, coding: dict | None = None, **options
) -> Path:
    """The frames, none or more, and noise to hear; ``coding`` are options of the codec, the rest of the file."""
    with av.open(str(path), 'w', options=options) as container:
        streams = []
        if len(frames):
            video = container.add_stream(codec, rate=30, options=coding or {})
            video.height, video.width, video.pix_fmt, video.gop_size = *frames.shape[1:3], 'yuv420p', 12
            streams.append((video, [av.VideoFrame.from_ndarray(frame, format='rgb24') for frame in frames]))
        if audio:
            noise = np.random.default_rng(0).uniform(-1, 1, (40, 1, 533)).astype(np.float32)
            sounds = [av.AudioFrame.from_ndarray(part, format='fltp', layout='mono') for part in noise]
            for i, sound in enumerate(sounds):
                sound.sample_rate, sound.pts = 16000, 533 * i
            streams.append((container.add_stream('aac', rate=16000, layout='mono'), sounds))
        for i in range(max(len(parts) for _, parts in streams)):
            for stream, parts in streams:
                container.mux(stream.encode(parts[i]) if i < len(parts) else [])
        for stream, _ in streams:
            container.mux(stream.encode())
    return path


def patch(source: Path, target: Path, box: bytes, offset: int, form: str, *values: int) -> Path:
    """A copy with other numbers so many bytes behind the name of the first such box."""
    content = bytearray(source.read_bytes())
    struct.pack_into(form, content, content.index(box) + 4 + offset, *values)
    target.write_bytes(content)
    return target


def read(path, reader: str, indices, **options) -> dict:
    """The sample after both transforms."""
    opened = OpenClip(reader=reader, **options)(dict(filename=str(path), label=1))
    return DecodeClip()(opened | dict(frame_inds=np.array(indices)))


def places(images, frames: np.ndarray) -> list[int]:
    """Which of the frames each image is."""
    return [int(np.abs(frames.astype(int) - image).mean((1, 2, 3)).argmin()) for image in images]


def refusal(path, reader: str, indices=ALL, **options) -> str:
    """What is said to be wrong with a file, and that it is said at once."""
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        read(path, reader, indices, **options)
    assert time.monotonic() - start < 20
    assert error.value.__cause__ is not None
    form = (
        f'filename must name a sound video, got {re.escape(str(path))}: (.+). Replace the file, or take it out of the '
    )
    return re.fullmatch(form + 'list.', str(error.value))[1]


@both_readers
def test_frames_are_those_asked_for_in_rgb(clip, frames, reader):
    indices = [3, 39, 3, 0, 20, 13]
    sample = read(clip, reader, indices)
    assert sample['total_frames'] == LENGTH and sample['label'] == 1
    assert places(sample['imgs'], frames) == indices
    assert all(image.dtype == np.uint8 and image.shape == (64, 96, 3) for image in sample['imgs'])
    assert sample['img_shape'] == sample['original_shape'] == (64, 96)
    corner = np.stack(sample['imgs'])[:, -1, -1].astype(int)
    assert np.abs(corner - frames[indices, -1, -1]).max() < 12  # red would be blue otherwise


def test_both_readers_give_the_same_frames(clip):
    decord, pyav = (np.stack(read(clip, reader, ALL)['imgs']).astype(int) for reader in READERS)
    assert np.abs(decord - pyav).mean() < 1


@both_readers
def test_both_readers_state_the_rate(clip, reader):
    """mmaction's sampler would ignore ``target_fps`` without it."""
    assert OpenClip(reader=reader)(dict(filename=str(clip)))['avg_fps'] == pytest.approx(30)


@both_readers
def test_a_sample_keeps_what_it_was_made_of(clip, reader):
    given = dict(filename=str(clip))
    OpenClip(reader=reader)(given)
    assert given == dict(filename=str(clip))


@pytest.mark.parametrize('name', ['clip.mkv', 'clip.webm', 'fragments.mp4'])
@both_readers
def test_frames_are_counted_where_the_container_states_no_number(clip, frames, tmp_path, reader, name):
    if name.endswith('webm'):
        path = encode(tmp_path / name, frames, 'libvpx-vp9')
    else:
        options = dict(movflags='frag_keyframe+empty_moov') if name.endswith('mp4') else {}
        path = remux(clip, tmp_path / name, **options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    sample = read(path, reader, [39, 0, 20], min_frames=LENGTH)
    assert sample['total_frames'] == LENGTH and places(sample['imgs'], frames) == [39, 0, 20]


@both_readers
def test_a_path_without_ending_is_that_of_an_mp4(clip, frames, tmp_path, reader):
    assert read(clip.with_suffix(''), reader, [7])['filename'] == str(clip)
    bare = tmp_path / 'bare'
    bare.write_bytes(clip.read_bytes())
    assert places(read(bare, reader, [7])['imgs'], frames) == [7]


@both_readers
def test_files_that_are_no_video_are_refused_with_the_reason(tmp_path, reader):
    assert refusal(tmp_path / 'gone.mp4', reader) == 'there is no such file'
    (tmp_path / 'folder.mp4').mkdir()
    assert refusal(tmp_path / 'folder.mp4', reader) == 'there is no such file'
    (tmp_path / 'empty.mp4').touch()
    assert refusal(tmp_path / 'empty.mp4', reader) == 'it is empty'
    sound = encode(tmp_path / 'sound.mp4', [], audio=True)
    assert refusal(sound, reader).startswith('it has no video stream')
    for name, content in (('noise', np.random.default_rng(0).bytes(5000)), ('page', b'<html>404</html>' * 100)):
        (tmp_path / f'{name}.mp4').write_bytes(content)
        assert refusal(tmp_path / f'{name}.mp4', reader).startswith('it is no video, or damaged (')


@both_readers
def test_a_video_without_frames_is_refused(tmp_path, frames, reader):
    path = encode(tmp_path / 'none.mp4', frames, movflags='frag_keyframe+empty_moov')
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b'moof') - 4])
    assert re.match('it has no frames|it is no video, or damaged', refusal(path, reader))


@both_readers
def test_clips_shorter_than_what_is_sampled_are_refused(clip, tmp_path, frames, reader):
    path = tmp_path / 'short.mp4'
    write_clip(path, frames[:7])
    with pytest.raises(ValueError) as error:
        OpenClip(reader=reader, min_frames=8)(dict(filename=str(path)))
    assert str(error.value) == (
        f'filename must name a video of at least 8 frames, as many as are sampled, got 7 in {path}. '
        'Sample fewer (clip_len), or take it out of the list.'
    )
    assert OpenClip(reader=reader, min_frames=7)(dict(filename=str(path)))['total_frames'] == 7


@pytest.mark.parametrize('part', [0.02, 0.3, 0.6, 0.99])
@pytest.mark.parametrize('index', ['first', 'last'])
@both_readers
def test_a_file_that_is_cut_short_is_refused(clip, tmp_path, reader, index, part):
    """Even where none of the frames asked for is missing: the next epoch would ask for others."""
    options = dict(movflags='faststart') if index == 'first' else {}
    content = remux(clip, tmp_path / 'whole.mp4', **options).read_bytes()
    start = content.index(b'mdat') + 4
    end = len(content) if index == 'first' else content.index(b'moov') - 4
    path = tmp_path / 'cut.mp4'
    path.write_bytes(content[: start + int(part * (end - start))])
    assert refusal(path, reader, [0]) == 'it is cut short'


@both_readers
def test_a_file_that_is_cut_short_within_its_sound_is_refused(tmp_path, frames, reader):
    content = encode(tmp_path / 'whole.mp4', frames, audio=True, movflags='faststart').read_bytes()
    start = content.index(b'mdat') + 4
    cuts = np.linspace(start + (len(content) - start) // 2, len(content) - 200, 12).astype(int)
    for cut in cuts:
        path = tmp_path / f'cut{cut}.mp4'
        path.write_bytes(content[:cut])
        assert refusal(path, reader, [0]) == 'it is cut short'


@pytest.mark.parametrize('name', ['clip.mp4', 'clip.mkv', 'clip.avi'])
@both_readers
def test_a_file_that_is_cut_short_between_two_frames_is_refused(clip, tmp_path, reader, name):
    """No frame that is left is damaged; of an avi without frames, decord 0.6.0 would crash."""
    path = remux(clip, tmp_path / name, **dict(movflags='faststart') if name.endswith('mp4') else {})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux() if packet.size]
    content = path.read_bytes()
    for packet in (packets[0], packets[29]):
        path.write_bytes(content[: packet.pos])
        assert refusal(path, reader, [0]) == 'it is cut short'


@pytest.mark.parametrize('codec', ['mpeg4', 'libx264'])
@pytest.mark.parametrize('zeros', [True, False])
@both_readers
def test_damaged_frames_are_refused(tmp_path, frames, reader, codec, zeros):
    path = encode(tmp_path / 'clip.mp4', frames, codec)
    content = bytearray(path.read_bytes())
    start, end = content.index(b'mdat') + 4, content.index(b'moov') - 4
    middle = slice(start + (end - start) * 2 // 5, start + (end - start) * 4 // 5)
    size = middle.stop - middle.start
    content[middle] = bytes(size) if zeros else np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    reason = refusal(path, reader)
    assert re.match('its frame [0-9]+ is damaged|it is no video, or damaged', reason)
    assert '/' not in reason  # nor the places in the source of decord


def test_a_frame_that_the_decoder_patches_up_is_refused_by_pyav(clip, tmp_path):
    """decord does not tell."""
    with av.open(str(clip)) as container:
        packet = [packet for packet in container.demux() if packet.size][20]
    content = bytearray(clip.read_bytes())
    content[packet.pos + packet.size // 2 : packet.pos + packet.size] = bytes(packet.size - packet.size // 2)
    path = tmp_path / 'damaged.mp4'
    path.write_bytes(content)
    assert refusal(path, 'pyav') == 'its frame 20 is damaged'


@both_readers
def test_frames_behind_the_last_one_are_refused(clip, reader):
    """mmaction's PyAVDecode would start again from the first."""
    reason = refusal(clip, reader, [0, LENGTH])
    assert 'only 40 of its 40 frames' in reason if reader == 'pyav' else 'Out of bound indices: [40]' in reason


@pytest.mark.parametrize('skip', [5, 12, 15])
def test_frames_that_an_edit_list_hides_are_not_counted_by_pyav_and_refused_by_decord(clip, frames, tmp_path, skip):
    """As ``ffmpeg -ss 0.5 -c copy`` writes them; decord would count them, and give a frame by where it came from."""
    path = remux(clip, tmp_path / 'cut.mp4', skip, avoid_negative_ts='disabled')
    sample = read(path, 'pyav', range(LENGTH - skip))
    assert sample['total_frames'] == LENGTH - skip
    assert places(sample['imgs'], frames) == list(range(skip, LENGTH))
    if skip % 12:  # else no frame is hidden
        assert 'times before its start' in refusal(path, 'decord', [0])
        assert refusal(path, 'decord', [0]).endswith("encode it anew, or set reader='pyav'")


@pytest.mark.parametrize('indices', [[39], [0, 39], range(40), range(0, 40, 3)])
def test_decord_gives_no_other_frame_in_the_place_of_one_that_is_hidden_at_the_end(clip, tmp_path, indices):
    path = patch(remux(clip, tmp_path / 'whole.mp4'), tmp_path / 'cut.mp4', b'elst', 8, '>I', 933)  # of 1333 ms
    with av.open(str(path)) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown == 28
    number = OpenClip()(dict(filename=str(path)))['total_frames']
    assert refusal(path, 'decord', [min(i, number - 1) for i in indices]) == (
        "it has fewer frames than it lists, or decord cannot find them: set reader='pyav' to read what is there"
    )


def test_frames_without_times_are_read_by_pyav_and_refused_by_decord(clip, frames, tmp_path):
    """decord seeks by time: it would give frames of wherever it arrives."""
    path = patch(clip, tmp_path / 'timeless.mp4', b'stts', 12, '>I', 0)
    assert places(read(path, 'pyav', ALL)['imgs'], frames) == ALL.tolist()
    assert 'its frames have no times of their own' in refusal(path, 'decord', [0])


def test_transport_streams_are_read_by_pyav_and_refused_by_decord(frames, tmp_path):
    path = encode(tmp_path / 'clip.ts', frames)
    assert places(read(path, 'pyav', ALL)['imgs'], frames) == ALL.tolist()
    assert refusal(path, 'decord').startswith('it is an MPEG transport stream, so that decord would give other frames')


OPEN_GOPS = {
    'mpeg4.mp4': dict(codec='mpeg4', coding=dict(bf='2', b='4M')),
    'mpeg4.mkv': dict(codec='mpeg4', coding=dict(bf='2', b='4M')),
    'hevc.mp4': dict(codec='libx265', coding={'x265-params': 'keyint=6:min-keyint=6:log-level=none'}),
    'h264.mp4': dict(coding={'x264-params': 'open-gop=1:keyint=6:bframes=3:b-adapt=0:scenecut=0'}),
}


@pytest.mark.parametrize('name', OPEN_GOPS)
def test_open_gops_are_read_by_pyav_and_refused_by_decord(frames, tmp_path, name):
    """A frame that comes behind a key frame but is shown before it: decord would give one for the other."""
    path = encode(tmp_path / name, frames, **OPEN_GOPS[name])
    assert places(read(path, 'pyav', ALL)['imgs'], frames) == ALL.tolist()
    reason = refusal(path, 'decord', [20])
    assert reason.startswith('it shows frames before the key frame that they follow (open GOP), so that decord would')
    assert reason.endswith("set reader='pyav'")


def test_without_pyav_open_gops_are_not_seen(frames, tmp_path, monkeypatch):
    """What docs/video.md says; where decord finds nothing at all, it says what else may help."""
    path = encode(tmp_path / 'clip.mp4', frames, **OPEN_GOPS['mpeg4.mp4'])
    monkeypatch.setitem(sys.modules, 'av', None)
    wrong = 0
    for i in range(LENGTH):
        try:
            wrong += places(read(path, 'decord', [i])['imgs'], frames) != [i]
        except ValueError as error:
            assert "or decord cannot find them: set reader='pyav'" in str(error)
    assert wrong


CLOSED_GOPS = {
    'b_frames.mp4': dict(coding=dict(bf='3')),
    'hevc.mp4': dict(codec='libx265', coding={'x265-params': 'keyint=6:open-gop=0:log-level=none'}),
    'hidden.webm': dict(codec='libvpx', coding={'auto-alt-ref': '1', 'lag-in-frames': '16', 'b': '4M'}),
}


@pytest.mark.parametrize('name', CLOSED_GOPS)
def test_files_of_closed_gops_are_read_by_decord_frame_by_frame(frames, tmp_path, name):
    path = encode(tmp_path / name, frames, **CLOSED_GOPS[name])
    assert [places(read(path, 'decord', [i])['imgs'], frames)[0] for i in range(LENGTH)] == ALL.tolist()


def test_windows_media_is_read_by_pyav_and_refused_by_decord(frames, tmp_path):
    """Most jumps of decord arrive at the key frame before the one that is meant."""
    path = encode(tmp_path / 'clip.wmv', frames, 'wmv2', coding=dict(b='4M'))
    assert places(read(path, 'pyav', ALL)['imgs'], frames) == ALL.tolist()
    assert refusal(path, 'decord', [20]).startswith('it is Windows Media (ASF), so that decord would give other frames')


@pytest.mark.parametrize(
    ('turns', 'matrix'),
    [(3, (0, 65536, 0, -65536, 0, 0)), (2, (-65536, 0, 0, 0, -65536, 0)), (1, (0, -65536, 0, 65536, 0, 0))],
)
@both_readers
def test_clips_of_turned_cameras_are_upright(clip, frames, tmp_path, reader, turns, matrix):
    path = patch(clip, tmp_path / 'turned.mp4', b'tkhd', 40, '>6i', *matrix)
    sample = read(path, reader, [0, 20])
    upright = np.rot90(frames, turns, axes=(1, 2))
    assert sample['imgs'][0].shape == upright.shape[1:] and sample['imgs'][0].flags.c_contiguous
    assert sample['img_shape'] == sample['original_shape'] == upright.shape[1:3]
    assert places(sample['imgs'], upright) == [0, 20]
    assert np.abs(np.stack(sample['imgs']).astype(int) - upright[[0, 20]]).mean() < 6


def test_what_decord_cannot_turn_is_left_to_pyav(frames, tmp_path):
    """The width of its turned frames must suit the alignment of its memory."""
    write_clip(tmp_path / 'clip.mp4', frames[:, :48, :64].copy())
    path = patch(tmp_path / 'clip.mp4', tmp_path / 'turned.mp4', b'tkhd', 40, '>6i', 0, 65536, 0, -65536, 0, 0)
    assert read(path, 'pyav', [0])['img_shape'] == (64, 48)
    assert refusal(path, 'decord', [0]) == "decord 0.6.0 cannot read clips of this width: set reader='pyav'"


@both_readers
def test_a_decoder_that_hangs_is_an_error_in_time(clip, reader):
    opened = OpenClip(reader=reader)(dict(filename=str(clip))) | dict(frame_inds=ALL)
    decode = DecodeClip(timeout=0.2)
    decode.decoders[reader].transform = lambda results: time.sleep(5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(f'got {clip}: decoding it did not end within 0.2 s.')):
        decode(opened)
    assert time.monotonic() - start < 3


@both_readers
def test_an_opener_that_hangs_is_an_error_in_time(clip, reader):
    opener = OpenClip(reader=reader, timeout=0.2)
    opener.open.transform = lambda results: time.sleep(5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(f'got {clip}: opening it did not end within 0.2 s.')):
        opener(dict(filename=str(clip)))
    assert time.monotonic() - start < 3


def test_a_disk_that_gives_up_is_not_a_decoder_that_hangs(clip):
    """Python calls both a TimeoutError."""
    opener = OpenClip()

    def give_up(path):
        raise TimeoutError(110, 'Connection timed out')

    opener.open.file_client.get = give_up
    with pytest.raises(ValueError, match='Connection timed out'):
        opener(dict(filename=str(clip)))


def test_a_reader_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(clips_module, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='reader must be installed, got none for pyav. Run `pip install av`'):
        OpenClip(reader='pyav')
    with pytest.raises(ImportError, match="pip install decord`, or where it has no wheel .*, and set reader='pyav'"):
        OpenClip()


@both_readers
def test_a_reader_that_cannot_be_imported_is_not_the_fault_of_the_clip(clip, monkeypatch, reader):
    opener = OpenClip(reader=reader)
    monkeypatch.setitem(sys.modules, dict(decord='decord', pyav='av')[reader], None)
    with pytest.raises(ImportError):
        opener(dict(filename=str(clip)))


def test_wrong_arguments_are_refused(clip):
    with pytest.raises(ValueError, match=re.escape("reader must be one of ['decord', 'pyav'], got 'opencv'.")):
        OpenClip(reader='opencv')
    for value in (0, -1, 2.5, '8'):
        with pytest.raises(ValueError, match=f'min_frames must be a positive integer, got {value!r}.'):
            OpenClip(min_frames=value)
    for value in (0, -1.0, None, '5', True, float('inf'), float('nan'), 1e12):  # threads cannot wait for the last ones
        message = re.escape(f'timeout must be a positive, finite number of seconds, got {value!r}.')
        for kind in (OpenClip, DecodeClip):
            with pytest.raises(ValueError, match=message):
                kind(timeout=value)
    with pytest.raises(ValueError, match='pipeline must open a clip with mmdyt.OpenClip before mmdyt.DecodeClip'):
        DecodeClip()(dict(filename=str(clip), frame_inds=ALL))


@both_readers
def test_mistakes_of_the_config_are_not_reported_as_broken_clips(clip, reader):
    with pytest.raises(ValueError, match=r"^io_backend must be one of \['disk', .*\], got 'dsk'\.$"):
        OpenClip(reader=reader, io_backend='dsk')
    message = r"^options must suit io_backend='disk', got {'num_thread': 2}: got an unexpected keyword argument"
    with pytest.raises(ValueError, match=message):
        OpenClip(reader=reader, num_thread=2)
    with pytest.raises(ValueError, match=r"^options must suit io_backend='lmdb', got {}: missing a required argument"):
        OpenClip(reader=reader, io_backend='lmdb')
    opened = OpenClip(reader=reader)(dict(filename=str(clip)))
    for indices in ({}, dict(frame_inds=ALL[:0])):
        with pytest.raises(ValueError, match='^pipeline must sample frames between mmdyt.OpenClip and mmdyt.DecodeCli'):
            DecodeClip()(opened | indices)


def test_threads_of_decord_are_a_number_and_not_for_pyav():
    for value in (-1, '2', None):
        with pytest.raises(
            ValueError, match=re.escape('num_threads must be an integer of at least 0 (as many as core')
        ):
            OpenClip(num_threads=value)
    with pytest.raises(ValueError) as error:
        OpenClip(reader='pyav', num_threads=1)
    assert str(error.value) == (
        "num_threads must be left out with reader='pyav', got 1. "
        'Set multi_thread=True of mmdyt.DecodeClip to let PyAV use several.'
    )


def test_no_connection_is_made_before_the_workers_start(monkeypatch):
    """They would share it."""

    def connect(*args, **options):
        raise AssertionError

    monkeypatch.setattr('mmdyt.datasets.containers.FileClient.__new__', connect)
    assert OpenClip(io_backend='petrel').open.file_client.client is None


def test_a_logged_pipeline_shows_the_options():
    opener = OpenClip(reader='pyav', min_frames=8, io_backend='disk')
    assert repr(opener) == "OpenClip(reader='pyav', min_frames=8, timeout=120.0, io_backend='disk')"
    assert repr(DecodeClip(timeout=5)) == 'DecodeClip(timeout=5, multi_thread=False)'


@both_readers
def test_options_reach_the_reader_of_mmaction(clip, frames, reader):
    options = dict(num_threads=2) if reader == 'decord' else {}
    opener = OpenClip(reader=reader, io_backend='disk', **options)
    assert getattr(opener.open, 'num_threads', 2) == 2 and opener.open.io_backend == 'disk'
    opened = opener(dict(filename=str(clip))) | dict(frame_inds=ALL)
    assert places(DecodeClip(multi_thread=True)(opened)['imgs'], frames) == ALL.tolist()


def build(folder: Path, names: list[str], reader: str):
    """A data set of mmaction with these clips, 8 frames of each."""
    (folder / 'list.txt').write_text(''.join(f'{name} 1\n' for name in names))
    pipeline = [
        dict(type='mmdyt.OpenClip', reader=reader, min_frames=8),
        dict(type='UniformSample', clip_len=8, test_mode=True),
        dict(type='mmdyt.DecodeClip'),
        dict(type='FormatShape', input_format='NCTHW'),
        dict(type='PackActionInputs'),
    ]
    with DefaultScope.overwrite_default_scope('mmaction'):
        return DATASETS.build(
            BASE | dict(ann_file='list.txt', data_root=str(folder), data_prefix=dict(video=''), pipeline=pipeline)
        )


@both_readers
def test_a_broken_clip_ends_a_run_with_workers_and_is_named(clip, tmp_path, reader):
    (tmp_path / 'sound.mp4').write_bytes(clip.read_bytes())
    (tmp_path / 'broken.mp4').write_bytes(clip.read_bytes()[:3000])
    loader = DataLoader(
        build(tmp_path, ['sound.mp4', 'broken.mp4'], reader), num_workers=1, batch_size=None, timeout=60
    )
    shapes = []
    with pytest.raises(ValueError, match=re.escape(f'got {tmp_path}/broken.mp4: it is cut short.')):
        for sample in loader:
            shapes.append(sample['inputs'].shape)
    assert shapes == [(1, 3, 8, 64, 96)]


@pytest.mark.skipif(not DATA.is_dir(), reason='MMDYT_DATA is not set: no real clips')
def test_real_clips_are_read_whole_by_pyav_and_by_decord_alike_or_not_at_all():
    import cv2

    paths = sorted((DATA / 'video/gmdcsa24_segments/videos').rglob('*.mp4'))
    assert len(paths) == 56
    for path in paths[::6]:
        number = OpenClip(reader='pyav')(dict(filename=str(path)))['total_frames']
        images = np.stack(read(path, 'pyav', range(number))['imgs']).astype(int)
        capture = cv2.VideoCapture(str(path))
        expected = [capture.read()[1] for _ in range(number)]
        assert not capture.read()[0]
        assert np.abs(images - np.stack(expected)[..., ::-1]).mean() < 2
        try:
            others = read(path, 'decord', range(number))['imgs']
        except ValueError as error:
            assert 'its frames have no times of their own' in str(error)
        else:
            assert np.abs(images - np.stack(others)).mean() < 1
