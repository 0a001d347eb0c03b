"""Blocks: every product in exactly one, each reads only what comes before it, and chained they compute the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.model import load_model
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin
from zsq_deploy.quant.reconstruct.blocks import find_blocks
from zsq_deploy.quant.reconstruct.template import PRODUCTS

from .nets import Builder, images, small_net


def check_cover(graph: Graph, blocks) -> None:
    products = [node.name for node in graph.nodes if node.op_type in PRODUCTS]
    assert sorted(name for block in blocks for name in block.products) == sorted(products)
    nodes = [name for block in blocks for name in block.nodes]
    assert len(nodes) == len(set(nodes))
    known = {spec.name for spec in graph.inputs}
    for block in blocks:
        assert set(block.inputs) <= known, block.name
        known.update(block.outputs)
    assert {spec.name for spec in graph.outputs} <= known


def check_chain(graph: Graph, blocks, x) -> None:
    """Running the blocks one after the other gives the numbers of the whole."""
    twin = Twin(graph, device="cpu")
    with torch.no_grad():
        values = {graph.inputs[0].name: torch.from_numpy(x)}
        whole = twin.run(dict(values))
        for block in blocks:
            values.update(twin.run({name: values[name] for name in block.inputs}, fetch=block.outputs))
    for name, tensor in whole.items():
        assert torch.equal(values[name], tensor)


def residual_net():
    b = Builder(1)
    x = b.node("Relu", b.conv("image", 3, 8))
    for _ in range(2):
        x = b.node("Relu", b.node("Add", b.conv(b.node("Relu", b.conv(x, 8, 8)), 8, 8), x))
    y = b.node("Add", b.conv(b.node("Relu", b.conv(x, 8, 16, stride=2)), 16, 16), b.conv(x, 8, 16, k=1, stride=2))
    y = b.node("Flatten", b.node("GlobalAveragePool", b.node("Relu", y)))
    return b.graph([b.gemm(y, 16, 10)])


def test_residual_blocks_and_single_layers():
    blocks = find_blocks(residual_net())
    assert [len(block.products) for block in blocks] == [1, 2, 2, 3, 1]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in blocks)
    check_cover(residual_net(), blocks)
    check_chain(residual_net(), blocks, images(3))


def test_a_small_limit_cuts_residual_blocks_into_layers():
    graph = residual_net()
    blocks = find_blocks(graph, largest=1)
    assert all(len(block.products) == 1 for block in blocks)
    check_cover(graph, blocks)
    check_chain(graph, blocks, images(3))


def test_a_skip_around_everything_is_no_block():
    b = Builder(2)
    x = "image"
    for _ in range(10):
        x = b.node("Relu", b.conv(x, 3, 3))
    graph = b.graph([b.node("Sub", "image", x)])
    blocks = find_blocks(graph)
    assert [len(block.products) for block in blocks] == [1] * 10
    assert set(blocks[-1].inputs) > {"image"}
    check_cover(graph, blocks)
    check_chain(graph, blocks, images(2))


def test_attention_is_one_block():
    b = Builder(3)
    b.node("Reshape", "image", b.constant(np.array([0, 3, 144], np.int64)))
    tokens = b.node("Transpose", "reshape_1", perm=[0, 2, 1])

    def project(x, cin=8, cout=8):
        return b.node("MatMul", x, b.constant(b.rng.normal(0, 0.3, (cin, cout)).astype(np.float32)))

    x = project(tokens, 3)
    q, k, v = project(x), b.node("Transpose", project(x), perm=[0, 2, 1]), project(x)
    y = b.node("MatMul", b.node("Softmax", b.node("MatMul", q, k), axis=-1), v)
    x = b.node("Add", x, project(y))
    graph = b.graph([b.node("Add", x, project(b.node("Relu", project(x))))])
    blocks = find_blocks(graph)
    assert [len(block.products) for block in blocks] == [1, 6, 2]
    check_cover(graph, blocks)
    check_chain(graph, blocks, images(2))


def test_values_that_may_not_be_cut_stay_inside():
    graph = residual_net()
    free = find_blocks(graph)
    bound = find_blocks(graph, uncut={free[1].outputs[0]})
    assert len(bound) == len(free) - 1
    assert [len(block.products) for block in bound] == [1, 4, 3, 1]
    check_cover(graph, bound)
    check_chain(graph, bound, images(2))


def test_two_outputs_and_heads_on_the_way():
    b = Builder(4)
    x = b.node("Relu", b.conv("image", 3, 8))
    head = b.node("Flatten", b.node("GlobalAveragePool", b.conv(x, 8, 4)))
    x = b.node("Relu", b.conv(x, 8, 8))
    tail = b.node("Flatten", b.node("GlobalAveragePool", b.conv(x, 8, 4)))
    graph = b.graph([b.node("Concat", head, tail, axis=1), tail])
    blocks = find_blocks(graph)
    check_cover(graph, blocks)
    check_chain(graph, blocks, images(2))


def test_the_order_of_writing_does_not_matter():
    graph = residual_net()
    blocks = find_blocks(graph)
    proto = graph.editable()
    ready, waiting, done = (
        [],
        list(proto.graph.node),
        {spec.name for spec in graph.inputs} | set(graph.initializer_names),
    )
    while waiting:  # always take the last node that can go next
        node = next(n for n in reversed(waiting) if all(name in done for name in n.input))
        waiting.remove(node)
        ready.append(node)
        done.update(node.output)
    copies = [type(node).FromString(node.SerializeToString()) for node in ready]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    other = find_blocks(Graph(proto))
    assert {frozenset(block.nodes) for block in other} == {frozenset(block.nodes) for block in blocks}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_random_networks(seed, largest):
    """Convolutions, sums, concatenations with random wiring."""
    rng = np.random.default_rng(seed)
    b = Builder(int(rng.integers(1000)))
    values = [b.conv("image", 3, 4)]
    for _ in range(int(rng.integers(4, 14))):
        kind = rng.choice(["conv", "relu", "add", "concat", "add"])
        first, second = (values[int(rng.integers(max(0, len(values) - 4), len(values)))] for _ in range(2))
        if kind == "conv":
            values.append(b.conv(first, 4, 4))
        elif kind == "relu":
            values.append(b.node("Relu", first))
        elif kind == "add":
            values.append(b.node("Add", first, second))
        else:
            values.append(b.conv(b.node("Concat", first, second, axis=1), 8, 4, k=1))
    outputs = list(dict.fromkeys([values[-1], values[int(rng.integers(len(values)))]]))
    graph = b.graph(outputs, size=6)
    blocks = find_blocks(graph, largest=largest)
    dead = [n for n in graph.nodes if n.op_type in PRODUCTS and n.name not in {p for x in blocks for p in x.products}]
    assert not dead
    check_cover(graph, blocks)
    check_chain(graph, blocks, images(2, size=6))


def test_the_small_network_of_this_folder():
    graph = small_net()
    check_cover(graph, find_blocks(graph))
    check_chain(graph, find_blocks(graph), images(2))


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "count", "largest"),
    [
        ("resnet20_cifar10", 11, 2),
        ("mlperf_tiny_resnet8_cifar10", 5, 3),
        ("mobilenet_v1_025_imagenet", 28, 1),
        ("squeezenet11_imagenet", 18, 2),
        ("vit_cifar10", 14, 4),
        ("ultraface_rfb320", 52, 1),
    ],
)
def test_real_networks(assets, name, count, largest):
    graph = load_model(assets / "models" / f"{name}.onnx").folded().graph
    blocks = find_blocks(graph)
    with_products = [block for block in blocks if block.products]
    assert len(with_products) == count
    assert max(len(block.products) for block in blocks) == largest
    check_cover(graph, blocks)
