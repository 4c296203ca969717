from betrace.service.storage.spanlog.decode import read_frames
from betrace.service.storage.spanlog.frames import Frame
from tests.support.spans import S, body


def test_a_frame_that_cannot_be_decoded_does_not_hide_the_others(caplog):
    good = Frame("protobuf", "", 5, body(S(1), S(2)), 2)
    bad = [
        Frame("protobuf", "gzip", 6, b"no gzip", 1),
        Frame("json", "", 7, b"{", 1),
        Frame("protobuf", "", 8, b"\xff\xff", 1),
    ]
    batch = read_frames("t", [10, 20, 30, 40], [bad[0], good, *bad[1:]], 1)
    assert len(batch) == 2
    assert batch.positions.tolist() == [10, 20, 30, 40]
    assert batch.received_ns == 8
    assert (batch.bodies[:, 4] != 0).tolist() == [True, False, True, True]
    assert caplog.text.count("cannot be decoded") == 2
