"""What the pass takes out of a joint graph and what it puts in, for one layer of each kind.

Lines with - are gone, lines with + are new; all others are as they were. New names end in a number
without an underscore, ``dy`` is the gradient of the result, and a bare ``mul`` and ``rsqrt`` are
the scale of the whole batch norm and that of the variance.
"""

from __future__ import annotations

import difflib
import re

import expecttest
import torch
from joint_graphs import run_pass
from programs import arguments, bn, conv_bn, in_dtype

from convbn_inductor_pass import Code


def changed_lines(fn, make, inputs: str = "x w b m v g beta") -> str:
    """A diff of the graph before and after, with names that do not depend on the rest of it."""
    [result] = run_pass(fn, *make().values())
    assert result.codes == [Code.FUSED]
    codes = [
        [re.sub(r"torch\.ops\.\w+\.(\w+)\.\w+", r"\1", li.split(";")[0]) for li in code.split("\n")]
        for code in (result.before, result.after)
    ]
    diff = list(difflib.unified_diff(*codes, n=0, lineterm=""))[2:]
    lines = [f"{li[0]} {li[1:].strip()}" for li in diff if li[0] != "@" and "return" not in li]
    text = "\n".join(lines).replace("tangents_1", "dy").replace("convert_element_type", "cast")
    for i, name in enumerate(inputs.split()):
        text = text.replace(f"primals_{i + 1}", name)
    text = re.sub(
        r"(convolution_backward\(.*?), \[\d?\].*(\[\w+, \w+, \w+\])\)", r"\1, ..., \2)", text
    )
    text = re.sub(
        r"(convolution_backward\(.*?), None, .*(\[\w+, \w+, \w+\])\)", r"\1, ..., \2)", text
    )
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in re.findall(r"[a-z]\w*(?![\w(=])", text):
        kind = re.sub(r"(_default|_tensor|_dim_int_list|_int_list)?(_\d+)?$", "", name)
        if name in names or not re.search(rf"^[-+] {name} = ", text, re.M):
            continue
        counts[kind] = counts.get(kind, 0) + 1
        names[name] = f"{kind}{counts[kind]}"
    for name, new in sorted(names.items(), key=lambda n: -len(n[0])):
        text = re.sub(rf"\b{name}\b(?!\()", new, text)
    return re.sub(r"(?<=[a-z])_\d+\b", "", text)


class GraphTest(expecttest.TestCase):
    maxDiff = None

    def test_convolution(self):
        self.assertExpectedInline(
            changed_lines(conv_bn, arguments(grad=("x",))),
            """\
- unsqueeze1 = unsqueeze(m, 0)
- unsqueeze2 = unsqueeze(unsqueeze1, 2)
- unsqueeze3 = unsqueeze(unsqueeze2, 3)
- sub1 = sub(convolution, unsqueeze3)
- mul1 = mul(dy, sub1)
- sum1 = sum(mul1, [0, 2, 3])
+ mul2 = mul(m, -1)
+ add1 = add(b, mul2)
+ mul3 = mul(sum, add1)
- unsqueeze4 = unsqueeze(mul, 0)
- unsqueeze5 = unsqueeze(unsqueeze4, 2)
- unsqueeze6 = unsqueeze(unsqueeze5, 3)
- mul4 = mul(dy, unsqueeze6)
- mul5 = mul(sum1, rsqrt)
- convolution_backward1 = convolution_backward(mul4, x, w, ..., [True, True, True])
- getitem1 = convolution_backward1[0]
- getitem2 = convolution_backward1[1]
- getitem3 = convolution_backward1[2]
+ reshape1 = reshape(mul, [-1, 1, 1, 1])
+ mul6 = mul(w, reshape1)
+ convolution_backward2 = convolution_backward(dy, x, mul6, ..., [True, True, False])
+ getitem4 = convolution_backward2[1]
+ mul7 = mul(getitem4, w)
+ sum2 = sum(mul7, [1, 2, 3], False)
+ add2 = add(sum2, mul3)
+ getitem5 = convolution_backward2[0]
+ reshape2 = reshape(mul, [-1, 1, 1, 1])
+ mul8 = mul(getitem4, reshape2)
+ mul9 = mul(sum, mul)
+ mul5 = mul(add2, rsqrt)""",
        )

    def test_grouped_transposed_convolution(self):
        def fn(x, w, b, *rest):
            return bn(torch.conv_transpose2d(x, w, None, groups=2), *rest)

        make = arguments(grad=("x",), x=(2, 4, 6, 6), w=(4, 2, 3, 3))
        self.assertExpectedInline(
            changed_lines(fn, make, "x w m v g beta"),
            """\
- unsqueeze1 = unsqueeze(m, 0)
- unsqueeze2 = unsqueeze(unsqueeze1, 2)
- unsqueeze3 = unsqueeze(unsqueeze2, 3)
- sub1 = sub(convolution, unsqueeze3)
- mul1 = mul(dy, sub1)
- sum1 = sum(mul1, [0, 2, 3])
+ reshape1 = reshape(w, [2, -1, 2, 3, 3])
+ mul2 = mul(m, -1)
+ mul3 = mul(sum, mul2)
- unsqueeze4 = unsqueeze(mul, 0)
- unsqueeze5 = unsqueeze(unsqueeze4, 2)
- unsqueeze6 = unsqueeze(unsqueeze5, 3)
- mul4 = mul(dy, unsqueeze6)
- mul5 = mul(sum1, rsqrt)
- convolution_backward1 = convolution_backward(mul4, x, w, ..., [True, True, False])
- getitem1 = convolution_backward1[0]
- getitem2 = convolution_backward1[1]
+ reshape2 = reshape(mul, [2, 1, 2, 1, 1])
+ mul6 = mul(reshape1, reshape2)
+ reshape3 = reshape(mul6, [-1, 2, 3, 3])
+ convolution_backward2 = convolution_backward(dy, x, reshape3, ..., [True, True, False])
+ getitem3 = convolution_backward2[1]
+ reshape4 = reshape(getitem3, [2, -1, 2, 3, 3])
+ mul7 = mul(getitem3, w)
+ reshape5 = reshape(mul7, [2, -1, 2, 3, 3])
+ sum2 = sum(reshape5, [1, 3, 4], False)
+ reshape6 = reshape(sum2, [-1])
+ add1 = add(reshape6, mul3)
+ getitem4 = convolution_backward2[0]
+ reshape7 = reshape(mul, [2, 1, 2, 1, 1])
+ mul8 = mul(reshape4, reshape7)
+ reshape8 = reshape(mul8, [-1, 2, 3, 3])
+ mul5 = mul(add1, rsqrt)""",
        )

    def test_linear(self):
        def fn(x, w, b, *rest):
            return bn(torch.nn.functional.linear(x, w, b), *rest)

        make = arguments(grad=("x",), x=(5, 3), w=(4, 3))
        self.assertExpectedInline(
            changed_lines(fn, make),
            """\
- unsqueeze1 = unsqueeze(m, 0)
- sub1 = sub(addmm, unsqueeze1)
- mul1 = mul(dy, sub1)
- sum1 = sum(mul1, [0])
+ permute1 = permute(dy, [1, 0])
+ mm1 = mm(permute1, x)
+ permute2 = permute(permute, [1, 0])
+ mul2 = mul(mm1, permute2)
+ sum2 = sum(mul2, [1], False)
+ mul3 = mul(m, -1)
+ add1 = add(b, mul3)
+ mul4 = mul(sum, add1)
+ add2 = add(sum2, mul4)
+ reshape1 = reshape(mul, [-1, 1])
+ mul5 = mul(mm1, reshape1)
+ reshape2 = reshape(mul, [-1, 1])
- mul6 = mul(sum1, rsqrt)
+ mul6 = mul(add2, rsqrt)
- mm2 = mm(mul, permute)
- permute3 = permute(mul, [1, 0])
- mm3 = mm(permute3, x)
- permute4 = permute(mm3, [1, 0])
+ mul7 = mul(permute, reshape2)
+ mm4 = mm(dy, mul7)
+ permute4 = permute(mul5, [1, 0])""",
        )

    def test_float16(self):
        make = in_dtype(arguments(grad=("x",)), torch.float16, "x w b")
        self.assertExpectedInline(
            changed_lines(conv_bn, make),
            """\
- cast1 = cast(convolution, torch.float32)
- unsqueeze1 = unsqueeze(m, 0)
- unsqueeze2 = unsqueeze(unsqueeze1, 2)
- unsqueeze3 = unsqueeze(unsqueeze2, 3)
- sub1 = sub(cast1, unsqueeze3)
- mul1 = mul(cast, sub1)
- sum1 = sum(mul1, [0, 2, 3])
+ mul2 = mul(cast, cast)
+ sum2 = sum(mul2, [0, 2, 3])
+ sqrt1 = sqrt(sum2)
+ log21 = log2(sqrt1)
+ ceil1 = ceil(log21)
+ neg1 = neg(ceil1)
+ add1 = add(neg1, -2)
+ cast2 = cast(w, torch.float32)
+ cast3 = cast(w, torch.float32)
+ cast4 = cast(b, torch.float32)
+ mul3 = mul(m, -1)
+ add2 = add(cast4, mul3)
+ mul4 = mul(sum, add2)
- unsqueeze4 = unsqueeze(mul, 0)
- unsqueeze5 = unsqueeze(unsqueeze4, 2)
- unsqueeze6 = unsqueeze(unsqueeze5, 3)
- mul5 = mul(cast, unsqueeze6)
- mul6 = mul(sum1, rsqrt)
- cast5 = cast(mul5, torch.float16)
- convolution_backward1 = convolution_backward(cast5, x, w, ..., [True, True, True])
- getitem1 = convolution_backward1[0]
- getitem2 = convolution_backward1[1]
- getitem3 = convolution_backward1[2]
+ abs1 = abs(mul)
+ log22 = log2(abs1)
+ ceil2 = ceil(log22)
+ add3 = add(ceil2, -8)
+ maximum1 = maximum(add1, add3)
+ clamp_min1 = clamp_min(maximum1, -24.0)
+ clamp_max1 = clamp_max(clamp_min1, 15.0)
+ exp21 = exp2(clamp_max1)
+ reciprocal1 = reciprocal(exp21)
+ reshape1 = reshape(exp21, [1, -1, 1, 1])
+ mul7 = mul(cast, reshape1)
+ cast6 = cast(mul7, torch.float16)
+ mul8 = mul(reciprocal1, mul)
+ reshape2 = reshape(mul8, [-1, 1, 1, 1])
+ mul9 = mul(cast2, reshape2)
+ cast7 = cast(mul9, torch.float16)
+ convolution_backward2 = convolution_backward(cast6, x, cast7, ..., [True, True, False])
+ getitem4 = convolution_backward2[1]
+ cast8 = cast(getitem4, torch.float32)
+ cast9 = cast(getitem4, torch.float32)
+ mul10 = mul(cast9, cast3)
+ sum3 = sum(mul10, [1, 2, 3], False)
+ div1 = div(sum3, exp21)
+ add4 = add(div1, mul4)
+ getitem5 = convolution_backward2[0]
+ reshape3 = reshape(mul8, [-1, 1, 1, 1])
+ mul11 = mul(cast8, reshape3)
+ cast10 = cast(mul11, torch.float16)
+ mul12 = mul(sum, mul)
+ cast11 = cast(mul12, torch.float16)
+ mul6 = mul(add4, rsqrt)""",
        )
