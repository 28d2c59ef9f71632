"""The chunked loss against the formula written out with autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tvaprune import losses
from tvaprune.losses import cross_entropy, distillation_loss, next_token_labels
from tvaprune.options.loss import LossOptions

TOKENS, VOCAB, WIDTH, TEACHER_WIDTH = 23, 50, 12, 16


def options(**changed) -> LossOptions:
    defaults = {"ce_weight": 1.0, "distillation_weight": 0.0, "distillation": "kl", "temperature": 1.0, "top_k": None}
    return LossOptions(**{**defaults, **changed})


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[[4, 11, 22]] = -100
    return (
        normal(TOKENS, WIDTH).requires_grad_(),
        normal(VOCAB, WIDTH),
        normal(TOKENS, TEACHER_WIDTH),
        normal(VOCAB, TEACHER_WIDTH),
        labels,
    )


def direct(
    inputs: tuple[Tensor, ...], ce_weight: float, weight: float, temperature: float, kind: str, top_k: int | None
):
    """The definition: all logits at once, gradients by autograd."""
    student_hidden, student_head, teacher_hidden, teacher_head, labels = inputs
    kept = labels != -100
    student = (student_hidden @ student_head.T)[kept]
    teacher = (teacher_hidden @ teacher_head.T)[kept]
    ce = F.cross_entropy(student, labels[kept])
    if kind == "mse":
        if top_k is not None:
            chosen = teacher.topk(top_k).indices
            student, teacher = student.gather(1, chosen), teacher.gather(1, chosen)
        distillation = F.mse_loss(student, teacher)
    else:
        p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        if top_k is not None and top_k < VOCAB:
            chosen = q.topk(top_k).indices
            p, q = (torch.cat([x.gather(1, chosen), 1 - x.gather(1, chosen).sum(1, keepdim=True)], 1) for x in (p, q))
        distillation = temperature**2 * (q * (q.log() - p.log())).sum(1).mean()
    return ce_weight * ce + weight * distillation, ce, distillation


def by_pieces(monkeypatch, chunk: int, piece: int) -> None:
    """Logits of `chunk` tokens at once, in fp32 of `piece`."""
    monkeypatch.setattr(losses, "_CPU_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(losses, "_CPU_SLICE", -(-piece * VOCAB // torch.get_num_threads()))


@pytest.mark.parametrize("top_k", [None, 1, 7, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(("ce_weight", "weight"), [(1.0, 0.01), (0.0, 1.0), (0.3, 0.7)])
def test_values_and_gradient_are_those_of_the_formula(monkeypatch, kind, temperature, top_k, ce_weight, weight):
    by_pieces(monkeypatch, chunk=5, piece=2)
    inputs = make_inputs()
    expected = direct(inputs, ce_weight, weight, temperature, kind, top_k)
    expected_gradient = torch.autograd.grad(expected[0] * 3, inputs[0])[0]
    actual = distillation_loss(
        *inputs,
        options(
            ce_weight=ce_weight, distillation_weight=weight, temperature=temperature, distillation=kind, top_k=top_k
        ),
    )
    for name, value, reference in zip(actual._fields, actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    (actual.loss * 3).backward()
    torch.testing.assert_close(inputs[0].grad, expected_gradient, rtol=1e-5, atol=1e-6)
    assert not actual.ce.requires_grad
    assert not actual.distillation.requires_grad


def test_without_a_teacher_it_is_cross_entropy(monkeypatch):
    by_pieces(monkeypatch, chunk=4, piece=3)
    student_hidden, student_head, _, _, labels = make_inputs()
    expected = F.cross_entropy(student_hidden @ student_head.T, labels)
    loss, ce, distillation = distillation_loss(student_hidden, student_head, None, None, labels, options())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert loss.item() == ce.item()
    assert distillation.item() == 0
    assert cross_entropy(student_hidden, student_head, labels).item() == loss.item()
    loss.backward()
    expected_gradient = torch.autograd.grad(F.cross_entropy(student_hidden @ student_head.T, labels), student_hidden)[0]
    torch.testing.assert_close(student_hidden.grad, expected_gradient, rtol=1e-5, atol=1e-6)


def test_a_student_that_equals_its_teacher_has_no_distillation_loss_or_gradient():
    student_hidden, student_head, _, _, labels = make_inputs()
    for top_k in (None, 5):
        result = distillation_loss(
            student_hidden,
            student_head,
            student_hidden.detach(),
            student_head,
            labels,
            options(ce_weight=0.0, distillation_weight=1.0, top_k=top_k),
        )
        assert abs(result.distillation.item()) < 1e-6
        gradient = torch.autograd.grad(result.loss, student_hidden)[0]
        assert gradient.abs().max() < 1e-6


def test_top_k_bounds_the_full_divergence_from_below():
    inputs = make_inputs()
    values = [
        distillation_loss(*inputs, options(distillation_weight=1.0, top_k=k)).distillation.item()
        for k in (1, 5, 20, VOCAB)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_ignored_tokens_get_no_gradient_and_chunks_do_not_matter(monkeypatch):
    results = []
    for chunk, piece in ((1, 1), (7, 3), (1000, 2), (1000, 1000)):
        by_pieces(monkeypatch, chunk, piece)
        inputs = make_inputs()
        loss = distillation_loss(*inputs, options(distillation_weight=0.5)).loss
        loss.backward()
        assert inputs[0].grad[inputs[4] == -100].abs().max() == 0
        assert inputs[0].grad[inputs[4] != -100].abs().sum(dim=1).min() > 0
        results.append((loss.detach(), inputs[0].grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_all_tokens_ignored_gives_zero_not_nan():
    inputs = make_inputs()
    loss = distillation_loss(*inputs[:4], torch.full((TOKENS,), -100), options(distillation_weight=1.0)).loss
    loss.backward()
    assert loss.item() == 0
    assert inputs[0].grad.abs().max() == 0


def test_bfloat16_matmuls_keep_the_softmax_in_fp32():
    inputs = make_inputs(torch.bfloat16)
    wide = tuple(x.detach().float() if x.is_floating_point() else x for x in inputs)
    wide[0].requires_grad_()
    expected = direct(wide, 1.0, 0.5, 1.0, "kl", None)[0]
    expected_gradient = torch.autograd.grad(expected, wide[0])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = distillation_loss(*inputs, options(distillation_weight=0.5))
    assert actual.loss.dtype == torch.float32
    torch.testing.assert_close(actual.loss, expected, rtol=5e-3, atol=0)
    actual.loss.backward()
    assert inputs[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(inputs[0].grad.float(), expected_gradient, rtol=0.05, atol=2e-3)


def test_autocast_does_not_lower_fp32_inputs():
    inputs = make_inputs()
    plain = distillation_loss(*inputs, options(distillation_weight=0.5)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distillation_loss(*inputs, options(distillation_weight=0.5)).loss.item() == plain.item()


def test_without_gradients_the_values_are_the_same():
    inputs = make_inputs()
    with_gradient = distillation_loss(*inputs, options(distillation_weight=0.5, temperature=2.0, top_k=5))
    with torch.no_grad():
        without = distillation_loss(*inputs, options(distillation_weight=0.5, temperature=2.0, top_k=5))
    assert not without.loss.requires_grad
    assert [value.item() for value in without] == [value.item() for value in with_gradient]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature\n  Input should be greater than 0 .*input_value=0.0"),
        ({"top_k": 0}, "top_k\n  Input should be greater than or equal to 1 .*input_value=0"),
        ({"top_k": VOCAB + 1}, "top_k = 51: must be between 1 and the vocabulary, 50"),
        ({"distillation": "cosine"}, "distillation\n  Input should be 'kl' or 'mse' .*input_value='cosine'"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*make_inputs(), options(**change))


def test_shapes_and_gradients_that_do_not_fit_are_named():
    student_hidden, student_head, teacher_hidden, teacher_head, labels = make_inputs()
    with pytest.raises(ValueError, match="go together"):
        distillation_loss(student_hidden, student_head, teacher_hidden, None, labels, options())
    with pytest.raises(ValueError, match="vocabularies differ"):
        distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head[:-1], labels, options())
    with pytest.raises(ValueError, match="teacher_hidden: expected"):
        distillation_loss(student_hidden, student_head, teacher_hidden[:-1], teacher_head, labels, options())
    with pytest.raises(ValueError, match="student: gets no gradient"):
        distillation_loss(student_hidden, student_head.requires_grad_(), None, None, labels, options())


def test_next_token_labels_shift_by_one_within_each_row():
    labels = next_token_labels(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32))
    assert labels.tolist() == [2, 3, -100, 5, 6, -100]
    assert labels.dtype == torch.int64
