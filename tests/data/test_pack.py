import numpy as np

from bigtrain.data.pack import IGNORE, pack, padding

WINDOW = np.array([5, 6, 9, 7, 8, 9, 4])  # 9 opens a document
BYTES = np.array([1, 2, 0, 3, 4, 0, 5])


def test_targets_follow_their_inputs():
    sample = pack(WINDOW, BYTES, np.array([2, 5]), document_mask=True)
    assert sample.token_T.tolist() == [5, 6, 9, 7, 8, 9]
    assert sample.target_T.tolist() == [6, 9, 7, 8, 9, 4]
    assert sample.target_bytes_T.tolist() == [2, 0, 3, 4, 0, 5]


def test_documents_restart_positions():
    sample = pack(WINDOW, BYTES, np.array([2, 5]), document_mask=True)
    assert sample.document_T.tolist() == [0, 0, 1, 1, 1, 2]
    assert sample.position_T.tolist() == [0, 1, 0, 1, 2, 0]
    assert sample.document_T.dtype == np.int32


def test_a_document_at_either_edge_opens_no_other():
    sample = pack(WINDOW, BYTES, np.array([0, 3, 6]), document_mask=True)
    assert sample.document_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert sample.position_T.tolist() == [0, 1, 2, 0, 1, 2]


def test_without_the_mask_the_window_is_one_document():
    sample = pack(WINDOW, BYTES, np.array([2, 5]), document_mask=False)
    assert sample.document_T.tolist() == [0] * 6
    assert sample.position_T.tolist() == [0, 1, 2, 3, 4, 5]


def test_padding_predicts_nothing():
    sample = padding(4)
    assert sample.target_T.tolist() == [IGNORE] * 4 and sample.target_bytes_T.tolist() == [0] * 4
    assert [a.dtype for a in sample] == [a.dtype for a in pack(WINDOW, BYTES, np.array([2]), True)]
