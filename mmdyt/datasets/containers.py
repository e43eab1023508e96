"""Does a video file end where it says that it ends? Decoders read on without asking."""

import struct

MATROSKA = b'\x1aE\xdf\xa3'


def is_cut_short(content: bytes) -> bool:
    """Whether a file is shorter than it states: an mp4 (ISO 14496-12), webm or mkv (RFC 8794), or avi (RIFF).

    Args:
        content: All of the file. Of another kind, or one that states no length, it counts as whole.
    """
    if content[:4] == b'RIFF':
        return len(content) < int.from_bytes(content[4:8], 'little') + 8 - 1  # the last byte may be padding
    if content[:4] == MATROSKA:
        return len(content) < _matroska_end(content)
    return _has_cut_box(content)


def _has_cut_box(content: bytes) -> bool:
    """Whether one of the boxes in a row that make an mp4 is longer than what is left of the file."""
    start = 0
    while start + 8 <= len(content):
        size, name, long_size = struct.unpack('>I4sQ', content[start : start + 16].ljust(16, b'\0'))
        size = long_size if size == 1 else size
        if size < 8:  # 0: up to the end of the file
            return False
        start += size
        if start > len(content):
            return name in (b'mdat', b'moov', b'moof')  # anything else may be rubbish behind the last box
    return False


def _matroska_end(content: bytes) -> int:
    """Where the segment that holds everything ends; 0 if it does not say."""
    start, size = _matroska_size(content, len(MATROSKA))
    start, size = _matroska_size(content, start + size + 4)  # behind the header, and the name of the segment
    return start + size


def _matroska_size(content: bytes, start: int) -> tuple[int, int]:
    """Where a number of as many bytes as its first bits say ends, and its value; all ones mean unknown: here 0."""
    width = 9 - (content[start : start + 1] or b'\xff')[0].bit_length()
    ones = (1 << 7 * width) - 1
    value = int.from_bytes(content[start : start + width], 'big') & ones
    return start + width, value if value != ones else 0
