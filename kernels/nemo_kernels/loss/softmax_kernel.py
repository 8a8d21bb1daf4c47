"""What lies between the products of a linear head's losses, in Triton: one program per row, or per
block of a row.

Shapes: C rows, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums_kernel(
    logits_CV, scale_C, labels_C, sums_C2, value_C, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    """One row. If its scale is 0, its logits are not read and its value is 0."""
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(scale_C + row).to(tl.float32) != 0
    column = tl.arange(0, BLOCK)
    logit_V = logits_CV + row * vocabulary
    largest = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, tl.where(counts, vocabulary, 0), BLOCK):
        at = start + column
        logit = tl.load(logit_V + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(logit, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logit - largest), 0)
    tl.store(sums_C2 + 2 * row, largest)
    tl.store(sums_C2 + 2 * row + 1, total)
    if labels_C is not None:
        label = tl.load(labels_C + row)
        known = counts & (label >= 0) & (label < vocabulary)
        logit = tl.load(logit_V + label, mask=known, other=float("nan")).to(tl.float32)
        tl.store(value_C + row, tl.where(counts, tl.log(total) - (logit - largest), 0.0))


@triton.jit
def cross_entropy_gradient_kernel(
    logits_CV, sums_C2, labels_C, scale_C, gradient_CV, vocabulary, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of a row: scale * (softmax - 1 at the label)."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_C + row).to(tl.float32)
    largest = tl.load(sums_C2 + 2 * row).to(tl.float32)
    total = tl.load(sums_C2 + 2 * row + 1).to(tl.float32)
    at = row * vocabulary + column
    read = column < tl.where(scale != 0, vocabulary, 0)
    logit = tl.load(logits_CV + at, mask=read, other=0).to(tl.float32)
    target = tl.where(column == tl.load(labels_C + row), 1.0, 0.0)
    gradient = tl.where(read, scale * (tl.exp(logit - largest) / total - target), 0.0)
    tl.store(gradient_CV + at, gradient.to(gradient_CV.dtype.element_ty), mask=column < vocabulary)


@triton.jit
def divergence_kernel(
    logits_CV, teacher_CV, sums_C2, teacher_sums_C2, scale_C, value_C, gradient_CV, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: sum of p (log p - log q), p the teacher's probabilities; and scale * (q - p)."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_C + row).to(tl.float32)
    largest = tl.load(sums_C2 + 2 * row).to(tl.float32)
    log_total = tl.log(tl.load(sums_C2 + 2 * row + 1).to(tl.float32))
    teacher_largest = tl.load(teacher_sums_C2 + 2 * row).to(tl.float32)
    teacher_log_total = tl.log(tl.load(teacher_sums_C2 + 2 * row + 1).to(tl.float32))
    column = tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    end = tl.where(scale != 0, vocabulary, 0)
    for start in range(0, vocabulary, BLOCK):
        at, read = row * vocabulary + start + column, start + column < end
        logit = tl.load(logits_CV + at, mask=read, other=0).to(tl.float32)
        teacher = tl.load(teacher_CV + at, mask=read, other=0).to(tl.float32)
        log_q = logit - largest - log_total
        log_p = teacher - teacher_largest - teacher_log_total
        p = tl.exp(log_p)
        value += tl.where(read, p * (log_p - log_q), 0.0)
        if gradient_CV is not None:
            gradient = tl.where(read, scale * (tl.exp(log_q) - p), 0.0)
            tl.store(
                gradient_CV + at,
                gradient.to(gradient_CV.dtype.element_ty),
                mask=start + column < vocabulary,
            )
    tl.store(value_C + row, tl.sum(value, 0))
