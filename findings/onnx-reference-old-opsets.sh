#!/bin/sh
# onnx 1.23.2, onnx.reference.ReferenceEvaluator
#
# Behaviour: the evaluator that ships with the format follows three operators' definitions only in part.
#   BatchNormalization of opset 9 to 13 mixes a tenth of the batch's own mean and variance into the stored ones; LRN
#   normalises as many channels as the batch has images; Softmax of opset 11 is taken along the last axis.
# Expected: a node with one output is in test mode and uses the stored statistics, so an image's result does not depend
#   on the other images; LRN runs over the channels; Softmax below opset 13 flattens the tensor to rows from axis 1 on,
#   each of which sums to 1. Guess before running: where a converter and the evaluator disagree, the converter is
#   wrong. Two converters to PyTorch agreed with each other and with the definition.
# Seen: for mean 0, variance 1, scale 1 and shift 0 the batch [1, 3] becomes [0.8, 2.8] in opset 13 and [1, 3] in 14,
#   and 1 alone becomes 0.95. LRN of all ones gives 1/2, inf, inf, inf for the four channels of a single image, and
#   1/2, 1/3, 1/3, 1/2 with four images. Softmax of a 2x3x4 tensor sums to 6 instead of 2.
# Why it matters: networks for verification travel as ONNX files of old opsets, and a converted network is trusted once
#   it agrees with this evaluator. With batch normalisation it cannot, at any tolerance.
# Source: BatchNormalization_9, LRN and Softmax under onnx/reference/ops. The page allows for mismatches with the
#   specification in general, which then takes precedence, and names none.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check onnx==1.23.2 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def run(operator, opset, x, constants=(), **attributes):
    x = np.asarray(x, dtype=np.float32)
    names = [f"c{i}" for i in range(len(constants))]
    stored = [numpy_helper.from_array(np.array([c], dtype=np.float32), n) for c, n in zip(constants, names)]
    nodes = [helper.make_node(operator, ["x", *names], ["y"], **attributes)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def normalised(opset, batch):
    return run("BatchNormalization", opset, np.reshape(batch, (-1, 1)), (1, 0, 0, 1), epsilon=0.0).ravel()


def response(images):
    return run("LRN", 13, np.ones((images, 4, 1, 1)), size=3, alpha=3.0, beta=1.0, bias=0.0)[0].ravel()


old, alone, new = normalised(13, [1, 3]), normalised(13, [1]), normalised(14, [1, 3])
print("BatchNormalization with mean 0 and variance 1 of the batch [1, 3]: opset 13", old, "opset 14", new)
print("  of 1 alone: opset 13", alone)
one, four = response(1), response(4)
print("LRN over 3 of 4 channels, all ones: one image", one, "; first of four images", four)
total = float(run("Softmax", 11, np.arange(24.0).reshape(2, 3, 4) / 10).sum())
print("Softmax of opset 11 of a 2x3x4 tensor sums to", round(total, 4), "; two rows sum to 2")
same = np.allclose(old, [0.8, 2.8]) and np.allclose(alone, 0.9487, atol=1e-3) and np.allclose(new, [1, 3])
same = same and np.isinf(one[1:]).all() and np.allclose(four, [1 / 2, 1 / 3, 1 / 3, 1 / 2]) and abs(total - 6) < 1e-4
sys.exit(0 if same else "the behaviour has changed")
PY
