import importlib.util
import pickle
import sys
from functools import partial

import pytest
import torch

from avion.data.tokenizer import tokenize, tokenizers
from avion.errors import UserError

START, END = 49406, 49407


def test_known_ids():
    """From CLIP's own vocabulary: "a photo of a cat" is 320 1125 539 320 2368."""
    assert tokenize("a photo of a cat")[0, :8].tolist() == [START, 320, 1125, 539, 320, 2368, END, 0]


@pytest.mark.parametrize("context", [8, 32, 77])
def test_shape_and_end_of_text(context):
    texts = ["cut", "put the knife down", "a " * 300, ""]
    tokens = tokenize(texts, context)
    assert tokens.shape == (4, context) and tokens.dtype == torch.int64
    assert (tokens[:, 0] == START).all()
    assert ((tokens == END).sum(1) == 1).all() and (tokens.max(1).values == END).all()
    assert tokens[2, -1] == END and (tokens[2, 1:-1] == 320).all()  # cut off, the end stays
    assert tokens[3].tolist() == [START, END] + [0] * (context - 2)


def test_case_spaces_and_html_do_not_matter():
    assert torch.equal(tokenize("Cut  the &amp; Bread\n"), tokenize("cut the & bread"))


@pytest.mark.parametrize("vocabulary", [3, 512, 49407])
def test_a_smaller_vocabulary_shares_entries_but_keeps_start_and_end(vocabulary):
    texts = ["a photo of a cat", "", "put the knife down " * 20]
    tokens, whole = tokenize(texts, 16, vocabulary), tokenize(texts, 16)
    assert tokens.dtype == torch.int64 and tokens.max() == vocabulary - 1 and tokens.min() >= 0
    for folded, original in zip(tokens.flatten().tolist(), whole.flatten().tolist(), strict=True):
        special = {START: vocabulary - 2, END: vocabulary - 1}
        assert folded == special.get(original, original % (vocabulary - 2))
    assert torch.equal(tokens.argmax(1), whole.argmax(1))
    assert torch.equal(tokenize(texts, 16, 60000), whole)


def test_it_can_be_sent_to_workers():
    there = pickle.loads(pickle.dumps(partial(tokenize, context_length=16)))
    assert torch.equal(there("cut bread"), tokenize(["cut bread"], 16))


def test_edges():
    assert tokenize([]).shape == (0, 77)
    with pytest.raises(UserError, match="context length"):
        tokenize("a", 2)
    with pytest.raises(UserError, match="vocabulary size: 2 leaves"):
        tokenize("a", 8, 2)


TEXTS = ["#C C puts the knife down", "a photo of a cat", "it's \U0001f600 naïve", "", "cut " * 100]


@pytest.mark.parametrize("needs", ["nothing of its package", "its package"])
def test_it_is_that_of_open_clip_whether_its_file_can_be_read_alone_or_not(needs, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    if needs == "its package":
        load = importlib.util.spec_from_file_location

        def needing_it(name, path):
            spec = load(name, path)
            spec.loader.exec_module = lambda module: exec("from . import coca_model", vars(module))
            return spec

        monkeypatch.setattr(importlib.util, "spec_from_file_location", needing_it)
    found = tokenizers()
    assert found.__name__ == ("open_clip.tokenizer" if needs == "its package" else "avion_open_clip_tokenizer")
    from open_clip.tokenizer import SimpleTokenizer

    expected = SimpleTokenizer(context_length=32)(TEXTS)
    assert torch.equal(found.SimpleTokenizer(context_length=32)(TEXTS), expected)
    assert torch.equal(tokenize(TEXTS, 32), expected)
