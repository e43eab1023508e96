"""Clips in class folders: labels are places of the folders' names, and hidden or foreign files are none."""

import pytest

from mmdyt import compat

compat.install()

from mmdyt.datasets.clip_folders import ClipFolders  # noqa: E402


def test_labels_follow_the_names_not_the_folders(tmp_path):
    for name in ('b/1.mp4', 'b/deep/2.AVI', 'b/notes.txt', 'b/.3.mp4', 'a/4.mkv', 'other/5.mp4'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    metainfo = dict(classes=('b', 'missing', 'a'))
    data = ClipFolders(data_root=str(tmp_path), data_prefix=dict(video=''), pipeline=[], metainfo=metainfo)
    found = [(data.get_data_info(i)['filename'], data.get_data_info(i)['label']) for i in range(len(data))]
    names = [('b/1.mp4', 0), ('b/deep/2.AVI', 0), ('a/4.mkv', 2)]
    assert found == [(str(tmp_path / name), label) for name, label in names]


def test_without_names_there_are_no_labels(tmp_path):
    with pytest.raises(ValueError, match='metainfo must name the classes'):
        ClipFolders(data_root=str(tmp_path), data_prefix=dict(video=''), pipeline=[])
