"""Sampling: its arithmetic, its seed, where it stops, and that the cache of keys and values changes nothing."""

import pytest
import torch

from bigtrain.config import Generate, Model
from bigtrain.data.tokenizer import Bytes, train_bpe
from bigtrain.errors import RunError, UserError
from bigtrain.generate import generate, sample
from bigtrain.model.initialise import initialise
from bigtrain.model.transformer import Transformer

CPU = torch.device("cpu")


def model(**changes) -> Transformer:
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "max_positions": 48, "init_std": 0.3}
    made = Transformer(Model(**{**shape, **changes}), 320)
    initialise(made, 0)
    return made.eval()


class Scripted:
    """A model that scores a fixed sequence of tokens highest, whatever it reads."""

    def __init__(self, tokens: list[int], max_positions: int = 100):
        self.tokens, self.config = tokens, Model(layers=1, width=8, heads=1, mlp_width=8, max_positions=max_positions)
        self.calls: list[int] = []

    def new_cache(self, batch: int, length: int):
        return None

    def __call__(self, token_BT, cache, last_only):
        self.calls.append(token_BT.shape[1])
        logits = torch.zeros(1, 1, 320)
        logits[0, 0, self.tokens[len(self.calls) - 1]] = 1.0
        return logits


def pieces(model, prompt: str = "a", tokenizer=None, **settings) -> list[str]:
    return list(generate(model, tokenizer or Bytes(), prompt, Generate(**{"tokens": 20, "temperature": 0.0, **settings}), CPU))


def test_equals_sampling_from_whole_forward_passes():
    """Token for token, with every setting in use: the cache is only a way to be faster."""
    made, tokenizer = model(), Bytes()
    settings = Generate(tokens=30, temperature=1.3, top_k=40, top_p=0.9, seed=3)
    ids, drawn = [tokenizer.eod_id, *tokenizer.encode("hello")], torch.Generator().manual_seed(3)
    written = []
    with torch.no_grad():
        for _ in range(30):
            token = sample(made(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size], settings, drawn)
            if token == tokenizer.eod_id:
                break
            ids.append(token)
            written.append(token)
    assert len(set(written)) > 10
    assert "".join(generate(made, tokenizer, "hello", settings, CPU)) == tokenizer.decode(written)


def test_the_prompt_is_read_once_and_then_one_token_at_a_time():
    scripted = Scripted([98] * 5)
    assert "".join(pieces(scripted, "hello", tokens=5)) == "bbbbb"
    assert scripted.calls == [6, 1, 1, 1, 1]  # end-of-document and five bytes


def draws(logits: list[float], n: int = 2000, **settings) -> torch.Tensor:
    """How often each token comes, as a share."""
    generator, chosen = torch.Generator().manual_seed(0), Generate(**settings)
    found = torch.tensor([sample(torch.tensor(logits), chosen, generator) for _ in range(n)])
    return torch.bincount(found, minlength=len(logits)) / n


LOGITS = [0.5, 2.0, -1.0, 1.0, 0.0]


def test_temperature_zero_and_top_k_one_and_a_tiny_nucleus_take_the_likeliest():
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}, {"temperature": 5e-324}):
        assert draws(LOGITS, 50, **settings)[1] == 1.0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    expected = (torch.tensor(LOGITS) / temperature).softmax(-1)
    assert torch.allclose(draws(LOGITS, temperature=temperature), expected, atol=0.04)


def test_top_k_and_the_nucleus_cut_and_renormalise():
    p = torch.tensor(LOGITS).softmax(-1)  # in order: tokens 1, 3, 0, 4, 2 with 0.555, 0.204, 0.124, 0.075, 0.028
    kept = torch.zeros(5)
    kept[[1, 3]] = p[[1, 3]]
    expected = kept / kept.sum()
    assert torch.allclose(draws(LOGITS, temperature=1.0, top_k=2), expected, atol=0.04)
    assert torch.allclose(draws(LOGITS, temperature=1.0, top_p=float(p[1] + p[3]) - 1e-3), expected, atol=0.04)
    # A nucleus that ends just after the second token takes the third, for its sum to reach p.
    three = draws(LOGITS, temperature=1.0, top_p=float(p[1] + p[3]) + 1e-3)
    assert (three > 0).tolist() == [True, True, False, True, False]
    assert (draws(LOGITS, temperature=5.0) > 0).all()
    # Top-k comes first: the nucleus counts within it.
    assert (draws(LOGITS, temperature=1.0, top_k=2, top_p=0.7) > 0).tolist() == [False, True, False, False, False]
    assert torch.allclose(draws(LOGITS, temperature=1.0, top_k=99), p, atol=0.04)


def test_the_seed_decides():
    made = model()
    one, again, other = (pieces(made, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_stops_at_the_end_of_a_document():
    scripted = Scripted([104, 105, Bytes.eod_id, 106])
    assert "".join(pieces(scripted)) == "hi" and len(scripted.calls) == 3


def test_stops_where_positions_end():
    assert "".join(pieces(Scripted([98] * 50, max_positions=8), "hello", tokens=50)) == "bb"
    assert len("".join(pieces(model(positions="learned"), "x" * 40, tokens=50, temperature=1.0, seed=1)).encode(errors="replace")) <= 7 * 3


def test_tokens_of_the_padded_vocabulary_are_never_drawn():
    made = model()
    made.head.weight.data[258:] = 100 * made.head.weight.data.abs().max()
    assert len("".join(pieces(made, temperature=1.0))) > 0  # an id beyond the tokenizer would raise IndexError


def test_never_half_a_character():
    text = "aé漢👩‍👩‍👧z"
    given = pieces(Scripted([*text.encode(), Bytes.eod_id]), tokens=60)
    assert given == list(text)
    assert pieces(Scripted([*"é".encode()[:1], 256])) == ["\ufffd"]  # cut short by the end: said, not dropped
    bpe = train_bpe(["aé漢👩z " * 3], 300)
    assert "".join(pieces(Scripted([*bpe.encode(text), bpe.eod_id]), tokenizer=bpe, tokens=60)) == text


@pytest.mark.parametrize("prompt", ["", "\x00", "‏‮", "é́", "👩‍👩‍👧", "<|endoftext|>", "a\r\nb\u2028c"])
def test_odd_prompts(prompt):
    for tokenizer in (Bytes(), train_bpe(["some text"], 300)):
        assert isinstance("".join(pieces(model(max_positions=100), prompt, tokenizer)), str)


def test_refusals():
    with pytest.raises(UserError, match="is an encoder"):
        pieces(model(causal=False))
    with pytest.raises(UserError, match="48 tokens long, the model has 48 positions"):
        pieces(model(), "x" * 47)
    with pytest.raises(UserError, match=r"'a\\udcff' is not text"):
        pieces(model(), "a\udcff")
    broken = model()
    broken.embedding.weight.data[0, 0] = float("nan")
    broken.head.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        pieces(broken)
