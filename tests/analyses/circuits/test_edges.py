"""The computational graph, the forward by edges against TransformerLens's hooks, and the laws of
edge scores."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from configured import GATED_RMS, GROUPED, ROTARY, configured

from mechmem.analyses.circuits.attribution import Attribution, components, scores_of
from mechmem.analyses.circuits.circuit import Circuit
from mechmem.analyses.circuits.circuit_overlap import CircuitOverlap
from mechmem.analyses.circuits.contrast import FIRST
from mechmem.analyses.circuits.edge_scores import EdgeScores
from mechmem.analyses.circuits.edges import attributed, patched
from mechmem.analyses.circuits.graph import Graph
from mechmem.analyses.circuits.wiring import Wiring, source_hooks, source_values
from mechmem.data.minimal_pair import MinimalPair
from mechmem.interventions.patch import Source
from mechmem.measures.accuracy import Accuracy
from mechmem.measures.kl import KL
from mechmem.measures.logit_difference import LogitDifference
from mechmem.models.backend import FAST
from mechmem.session import Session
from mechmem.spec.errors import InputError

FIELDS = [
    {},
    {"n_layers": 1, "norm": None},
    {"n_layers": 3, "norm": "rms_norm", "activation": "gelu", "d_head": 5},
    {"attn_only": True},
    {"attn_only": True, "norm": None, "n_layers": 3, "n_heads": 3, "d_head": 4},
]
CONFIGS = {"grouped": GROUPED, "gated-rms": GATED_RMS, "both": GROUPED | GATED_RMS}
MODELS = pytest.mark.parametrize(
    "fields",
    [*FIELDS, *({"config": name} for name in CONFIGS)],
    ids=lambda f: "-".join(map(str, f.values())) or "default",
)


@pytest.fixture(scope="module")
def pairs(task):
    """Nine noisy instances with their minimal pairs."""
    train = task.sample("train")
    return (
        task.pairs(train.select(train.is_noisy), MinimalPair(flip="carry_2"))
        .select(torch.arange(9))
        .as_set()
    )


@pytest.fixture
def contrast_of(pairs, random_models):
    def made(fields, **analysis):
        if "config" in fields:
            model = configured(12, 14, **CONFIGS[fields["config"]])
        else:
            model = random_models(0, **fields)
        session = Session(models={"after": model}, example_sets={"noisy": pairs})
        return Attribution(**analysis).contrast(session)

    return made


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def batch_of(contrast):
    (batch,) = contrast.batches()
    return batch


def losses_of(contrast, batch):
    return contrast.losses(batch.examples, batch.baseline)


def loss_of(contrast, batch):
    return contrast.loss(batch.examples, batch.baseline)


def switched_on(model):
    """The same model with the hooks that TransformerLens leaves out unless its configuration asks
    for them."""
    model = copy.deepcopy(model)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(True)
    return model


def target_hook(graph, model, t):
    """(hook, head or None) of a target's input in TransformerLens."""
    node = graph.targets[t]
    if node.kind == "logits":
        return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", None
    if node.kind == "mlp":
        return f"blocks.{node.layer}.hook_mlp_in", None
    return f"blocks.{node.layer}.hook_{node.kind}_input", int(
        node.name.split(".h")[1].split(".")[0]
    )


def at_head(x, head):
    return x if head is None else x[:, :, head]


@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("has_mlp", [True, False])
def test_sources_and_targets_are_as_many_as_they_should_be(n_layers, n_heads, has_mlp):
    graph = Graph(n_layers, n_heads, n_heads, has_mlp)
    assert len(graph.sources) == 1 + n_layers * (n_heads + has_mlp)
    assert len(graph.targets) == n_layers * (3 * n_heads + has_mlp) + 1
    assert len({node.name for node in graph.sources}) == len(graph.sources)
    assert len({node.name for node in graph.targets}) == len(graph.targets)


def test_the_graph_of_one_layer_and_one_head_by_hand():
    graph = Graph(1, 1, 1, True)
    assert [node.name for node in graph.sources] == ["embed", "a0.h0", "m0"]
    assert [node.name for node in graph.targets] == [
        "a0.h0.q",
        "a0.h0.k",
        "a0.h0.v",
        "m0",
        "logits",
    ]
    assert graph.exists.int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert graph.owner.tolist() == [1, 1, 1, 2, 3]


def test_an_edge_goes_to_every_later_target_and_to_no_other():
    graph = Graph(3, 2, 2, True)
    for s, source in enumerate(graph.sources):
        for t, target in enumerate(graph.targets):
            within = source.kind == "head" and target.kind == "mlp" and source.layer == target.layer
            assert graph.exists[s, t] == (source.layer < target.layer or within), (source, target)


def test_top_edges_are_those_of_the_largest_absolute_score():
    graph = Graph(1, 1, 1, True)
    scores = torch.tensor([[1.0, -5, 2, 0, 3], [9, 9, 9, -4, 0], [9, 9, 9, 9, 0.5]])
    assert graph.top(scores, 3).nonzero().tolist() == [[0, 1], [0, 4], [1, 3]]
    assert graph.top(scores, 0).sum() == 0
    assert torch.equal(graph.top(scores, graph.n_edges), graph.exists)


@pytest.mark.parametrize("n", [0, 1, 17, 46])
def test_drawn_edges_exist_are_as_many_as_asked_and_nest(n):
    graph = Graph(2, 2, 2, True)
    drawn = [graph.drawn(m, torch.Generator().manual_seed(3)) for m in (n, 46)]
    assert drawn[0].sum() == n
    assert not (drawn[0] & ~drawn[1]).any()
    assert not (drawn[1] & ~graph.exists).any()


def test_head_permuted_edges_are_those_of_other_heads_with_their_inputs():
    graph = Graph(3, 4, 4, True)
    edges = torch.stack([graph.drawn(60, torch.Generator().manual_seed(i)) for i in range(20)])
    for i, circuit in enumerate(edges):
        other = graph.head_permuted(circuit, torch.Generator().manual_seed(i))
        assert not (other & ~graph.exists).any()
        assert kinds_of(graph, other) == kinds_of(graph, circuit)
        assert (
            graph.nodes(graph.connected(other)).sum() == graph.nodes(graph.connected(circuit)).sum()
        )
        assert not torch.equal(other, circuit)
    assert torch.equal(graph.head_permuted(graph.exists, torch.Generator()), graph.exists)
    alone = Graph(2, 1, 1, True)
    assert torch.equal(
        alone.head_permuted(alone.drawn(9, torch.Generator()), torch.Generator()),
        alone.drawn(9, torch.Generator()),
    )


def kinds_of(graph, edges):
    """How many edges there are between each kind and layer of source and of target."""
    ends = [(graph.sources[s], graph.targets[t]) for s, t in edges.nonzero().tolist()]
    return Counter((s.kind, s.layer, t.kind, t.layer) for s, t in ends)


def test_permuting_heads_by_hand():
    """With two heads, the one draw that exchanges them moves every edge of the first to the
    second."""
    graph = Graph(1, 2, 2, True)
    edges = torch.zeros_like(graph.exists)
    edges[0, 0] = edges[0, 4] = edges[1, 6] = (
        True  # embed -> a0.h0.q, embed -> a0.h0.v, a0.h0 -> m0
    )
    assert [graph.targets[t].name for t in (0, 4, 6)] == ["a0.h0.q", "a0.h0.v", "m0"]
    found = {
        tuple(
            map(
                tuple,
                graph.head_permuted(edges, torch.Generator().manual_seed(i)).nonzero().tolist(),
            )
        )
        for i in range(9)
    }
    assert found == {((0, 0), (0, 4), (1, 6)), ((0, 1), (0, 5), (2, 6))}


def test_pruning_by_hand():
    graph = Graph(1, 1, 1, True)
    edges = torch.zeros_like(graph.exists)
    edges[0, 2] = edges[1, 3] = True  # embed -> v, head -> MLP, and nothing from the MLP on
    assert not graph.connected(edges).any()
    edges[2, 4] = True
    assert torch.equal(graph.connected(edges), edges)
    edges[0, 2] = False  # nothing reaches the head
    assert not graph.connected(edges).any()
    edges[0, 3] = True
    assert graph.connected(edges).nonzero().tolist() == [[0, 3], [2, 4]]
    assert graph.nodes(graph.connected(edges)).tolist() == [False, False, True]
    assert graph.nodes(edges).tolist() == [False, True, True]


@MODELS
def test_pruning_changes_no_output(fields, contrast_of):
    contrast = contrast_of(fields)
    graph, generator = contrast.graph, torch.Generator().manual_seed(0)
    edges = torch.stack([graph.drawn(graph.n_edges // 3, generator) for _ in range(12)])
    pruned = torch.stack([graph.connected(e) for e in edges])
    assert (pruned.sum((1, 2)) < edges.sum((1, 2))).any()
    close(contrast.values(pruned), contrast.values(edges))


@MODELS
@pytest.mark.parametrize("n_readout", [1, 5, 14])
def test_all_edges_are_the_model_and_no_edge_is_the_corrupted_run(fields, n_readout, contrast_of):
    contrast = contrast_of(fields)
    batch, exists = batch_of(contrast), contrast.graph.exists.float()
    wiring = Wiring(contrast.model, batch.wiring.corrupted, n_readout)
    pairs, rows = contrast.examples.counterfactual, torch.arange(len(contrast.examples))
    whole = FAST.run(contrast.model, contrast.examples.tokens, rows, n_readout)[0]
    corrupted = FAST.run(contrast.model, pairs.tokens, rows, n_readout)[0]
    found = wiring.logits(batch.clean[:1], torch.stack([exists, 0 * exists]))
    close(found[0], whole)
    close(found[1], corrupted)
    close(wiring.logits(batch.clean[:1])[0], whole)
    assert not torch.allclose(whole, corrupted, atol=0.1)


@torch.no_grad()
def test_the_metric_sets_the_given_label_against_the_pairs_true_one(contrast_of, pairs):
    """The clean run is fed the given label's digits, the corrupted run the pair's operands and the
    pair's own digits."""
    contrast = contrast_of({})
    exists, pair = contrast.graph.exists, pairs.counterfactual
    assert (pairs.given != pairs.true).any(1).all()
    assert torch.equal(pair.given, pair.true)
    runs = [(pairs.prompt, pairs.given), (pair.prompt, pair.true)]
    expected = []
    for prompt, answer in runs:
        logits = contrast.model(torch.cat([prompt, answer[:, :-1]], 1))[:, -5:]
        given, other = (
            logits.gather(-1, labels[..., None])[..., 0] for labels in (pairs.given, pair.true)
        )
        expected.append((given - other).mean(1))
    full, corrupted = contrast.values(torch.stack([exists, torch.zeros_like(exists)]))
    close(full, expected[0])
    close(corrupted, expected[1])


@MODELS
@torch.no_grad()
def test_a_forward_goes_on_from_any_layer(fields, contrast_of):
    contrast = contrast_of(fields)
    batch, graph = batch_of(contrast), contrast.graph
    for layer in range(graph.n_layers + 1):
        known = batch.clean[: 1 + layer * graph.per_layer]
        close(batch.wiring.logits(known)[0], batch.baseline)


@torch.no_grad()
def test_corrupted_by_a_mean_every_node_takes_the_mean_of_its_own_values(
    random_models, pairs, others
):
    model = random_models(0)
    session = Session(models={"after": model}, example_sets={"noisy": pairs, "clean": others})
    contrast = Attribution(corrupted=Source(mean_over="clean")).contrast(session)
    batch = batch_of(contrast)
    found = batch.wiring.logits(
        batch.clean[:1], torch.zeros_like(contrast.graph.exists)[None].float()
    )[0]
    resid = model.run_with_cache(others.tokens)[1]["blocks.1.hook_resid_post"].mean(0, keepdim=True)
    close(found, model.unembed(model.ln_final(resid))[:, -5:].expand_as(found))


@MODELS
@torch.no_grad()
def test_any_circuit_is_what_transformer_lens_hooks_make_of_it(fields, contrast_of):
    """The oracle edits every input as it comes: less what the sources left out now say, plus what
    they should say."""
    contrast = contrast_of(fields)
    graph, batch, model = contrast.graph, batch_of(contrast), switched_on(contrast.model)
    circuits = torch.stack(
        [graph.drawn(graph.n_edges // 2, torch.Generator().manual_seed(i)) for i in range(4)]
    )
    found = batch.wiring.logits(batch.clean[:1], circuits.float())
    for circuit, logits in zip(circuits, found, strict=True):
        hooks = circuit_hooks(graph, model, circuit, batch.wiring.corrupted)
        expected = model.run_with_hooks(contrast.examples.tokens, fwd_hooks=hooks)[:, -5:]
        close(logits, expected)


def circuit_hooks(graph, model, circuit, corrupted):
    now = {}

    def write(first, value, hook):
        now.update(
            {
                first + i: v
                for i, v in enumerate(value.movedim(2, 0) if value.ndim == 4 else [value])
            }
        )

    def read(t, head, x, hook):
        x = x.clone()
        for s in (graph.exists[:, t] & ~circuit[:, t]).nonzero()[:, 0].tolist():
            bias = (
                model.blocks[graph.sources[s].layer].attn.b_O / graph.n_heads
                if graph.sources[s].kind == "head"
                else 0
            )
            at_head(x, head).add_(corrupted[s] - bias - now[s])
        return x

    hooks = []
    for t in range(len(graph.targets)):
        name, head = target_hook(graph, model, t)
        hooks.append((name, lambda x, hook, t=t, head=head: read(t, head, x, hook)))
    hooks.append(("blocks.0.hook_resid_pre", lambda x, hook: write(0, x, hook)))
    for layer in range(graph.n_layers):
        first = 1 + layer * graph.per_layer
        hooks.append(
            (f"blocks.{layer}.attn.hook_result", lambda x, hook, first=first: write(first, x, hook))
        )
        if graph.has_mlp:
            at = first + graph.n_heads
            hooks.append(
                (f"blocks.{layer}.hook_mlp_out", lambda x, hook, at=at: write(at, x, hook))
            )
    return hooks


@MODELS
@torch.no_grad()
def test_patching_each_edge_is_what_transformer_lens_hooks_make_of_it(fields, contrast_of):
    contrast = contrast_of(fields)
    graph, batch, model = contrast.graph, batch_of(contrast), switched_on(contrast.model)
    found = patched(batch.wiring, batch.clean, losses_of(contrast, batch)).sum(0)
    change, before = (
        batch.wiring.corrupted - batch.clean,
        contrast.measured(batch.baseline, batch.examples, batch.baseline),
    )
    for s, t in graph.exists.nonzero().tolist():
        name, head = target_hook(graph, model, t)

        def edge(x, hook, s=s, head=head):
            x = x.clone()
            at_head(x, head).add_(change[s])
            return x

        logits = model.run_with_hooks(batch.examples.tokens, fwd_hooks=[(name, edge)])[:, -5:]
        close(
            found[s, t], (before - contrast.measured(logits, batch.examples, batch.baseline)).sum()
        )
    assert not found[~graph.exists].any()


@MODELS
def test_scores_of_all_edges_into_a_node_sum_to_the_score_of_its_input(fields, contrast_of):
    contrast = contrast_of(fields)
    graph, batch, model = contrast.graph, batch_of(contrast), switched_on(contrast.model)
    scores = attributed(batch.wiring, batch.clean, losses_of(contrast, batch)).sum(0)
    clean, gradients, corrupted = {}, {}, {}
    names = {target_hook(graph, model, t)[0] for t in range(len(graph.targets))}
    forwards = [(name, lambda x, hook: clean.update({hook.name: x.detach()})) for name in names]
    backwards = [
        (name, lambda g, hook: gradients.update({hook.name: g.detach()})) for name in names
    ]
    with model.hooks(forwards, backwards):
        loss_of(contrast, batch)(model(batch.examples.tokens)[:, -5:]).backward()
    other = [(name, lambda x, hook: corrupted.update({hook.name: x.detach()})) for name in names]
    model.run_with_hooks(batch.examples.counterfactual.tokens, fwd_hooks=other)
    for t in range(len(graph.targets)):
        name, head = target_hook(graph, model, t)
        expected = (
            at_head(corrupted[name] - clean[name], head) * at_head(gradients[name], head)
        ).sum()
        close(scores[:, t].sum(), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_eap_is_the_slope_of_patching_the_edge_by_central_differences(config, pairs):
    """In float64, the input of the target moved to either side by a little of the change."""
    model = configured(12, 14, dtype=torch.float64, **CONFIGS[config])
    session = Session(models={"after": model}, example_sets={"noisy": pairs})
    contrast = Attribution().contrast(session)
    graph, batch, switched = contrast.graph, batch_of(contrast), switched_on(model)
    loss, step = loss_of(contrast, batch), 1e-4
    found = attributed(batch.wiring, batch.clean, losses_of(contrast, batch)).sum(0)
    change = [
        theirs - own
        for own, theirs in zip(
            *(written(graph, switched, e.tokens) for e in (pairs, pairs.counterfactual)),
            strict=True,
        )
    ]
    edges = [("embed", "a0.h1.q"), ("embed", "a1.h1.k"), ("a0.h1", "a1.h0.v"), ("a0.h0", "m0")]
    edges += [("m0", "a1.h1.q"), ("m0", "m1"), ("a1.h1", "logits")]
    for source, target in edges:
        s = [node.name for node in graph.sources].index(source)
        t = [node.name for node in graph.targets].index(target)
        name, head = target_hook(graph, model, t)

        def moved(by, s=s, name=name, head=head):
            def edge(x, hook):
                x = x.clone()
                at_head(x, head).add_(by * change[s])
                return x

            with torch.no_grad():
                return loss(switched.run_with_hooks(pairs.tokens, fwd_hooks=[(name, edge)])[:, -5:])

        slope = (moved(step) - moved(-step)) / (2 * step)
        torch.testing.assert_close(found[s, t], slope, rtol=1e-5, atol=1e-9)
        assert slope.abs() > 1e-4, (source, target)


@torch.no_grad()
def written(graph, model, tokens):
    """What each source writes, by TransformerLens's cache; heads without their share of b_O, which
    is the same in every run."""
    _, cache = model.run_with_cache(tokens)
    found = [cache["hook_embed"] + cache["hook_pos_embed"]]
    for layer in range(graph.n_layers):
        found += cache[f"blocks.{layer}.attn.hook_result"].unbind(2)
        found += [cache[f"blocks.{layer}.hook_mlp_out"]] if graph.has_mlp else []
    return found


@pytest.mark.parametrize("method", ["eap", "eap_ig", "exact"])
def test_the_scores_of_an_example_are_those_of_a_set_of_it_alone(method, contrast_of):
    contrast = contrast_of({})
    found = contrast.scores_by_example(method)
    assert len(found) == len(contrast.examples)
    close(found.mean(0), contrast.scores(method))
    for row in (0, 4):
        one = contrast.examples.select([row]).as_set()
        alone = Session({"after": contrast.model}, {"noisy": one})
        close(Attribution().contrast(alone).scores(method), found[row])
    assert not torch.allclose(found[0], found[4], atol=1e-2)


@MODELS
def test_scores_of_all_edges_out_of_a_node_sum_to_its_attribution(fields, contrast_of):
    contrast = contrast_of(fields)
    scored = components(contrast, neurons=False)
    nodes = torch.cat([scores.mean(0) for scores in scores_of(contrast, scored)])
    assert len(nodes) == len(contrast.graph.sources)
    close(contrast.scores("eap").sum(1), nodes)
    assert nodes.abs().max() > 0.001


def test_on_a_model_that_is_linear_in_its_edges_eap_is_exact(contrast_of):
    contrast = contrast_of({"attn_only": True, "norm": None})
    batch, hooks = batch_of(contrast), [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
    patterns = list(contrast.session.activations(contrast.model, contrast.examples, hooks).values())
    frozen = Wiring(contrast.model, batch.wiring.corrupted, 5, patterns)
    close(frozen.logits(batch.clean[:1])[0], batch.baseline)
    losses = losses_of(contrast, batch)
    eap = attributed(frozen, batch.clean, losses)
    close(eap, patched(frozen, batch.clean, losses))
    eap = eap.sum(0)
    values = [node.kind in ("v", "logits") for node in contrast.graph.targets]
    assert eap[:, values].abs().max() > 0.1
    assert not eap[:, [not v for v in values]].any()  # nothing goes through queries and keys
    unfrozen = attributed(batch.wiring, batch.clean, losses).sum(0)
    assert not torch.allclose(eap, unfrozen, atol=0.01)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_with_frozen_norms_too_eap_is_exact(norm, contrast_of, monkeypatch):
    contrast = contrast_of({"attn_only": True, "norm": norm, "n_layers": 3})
    batch, hooks = batch_of(contrast), [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    patterns = list(contrast.session.activations(contrast.model, contrast.examples, hooks).values())
    frozen, losses = (
        Wiring(contrast.model, batch.wiring.corrupted, 5, patterns),
        losses_of(contrast, batch),
    )
    assert not torch.allclose(
        attributed(frozen, batch.clean, losses), patched(frozen, batch.clean, losses), atol=0.01
    )
    monkeypatch.setattr(
        "mechmem.analyses.circuits.wiring.normed",
        frozen_norms(contrast.model, contrast.examples.tokens),
    )
    close(frozen.logits(batch.clean[:1])[0], batch.baseline)
    eap = attributed(frozen, batch.clean, losses)
    close(eap, patched(frozen, batch.clean, losses))
    assert eap.abs().max() > 0.1


def frozen_norms(model, tokens):
    """Every norm divides by what it divides by in the clean run, whatever it reads."""
    _, cache = model.run_with_cache(tokens)
    scales = {
        id(block.ln1): cache[f"blocks.{i}.ln1.hook_scale"] for i, block in enumerate(model.blocks)
    }
    scales[id(model.ln_final)] = cache["ln_final.hook_scale"]

    def normed(norm, x):
        scale = scales[id(norm)].detach()[:, -x.shape[-2] :]
        return (
            (x - x.mean(-1, keepdim=True)) / scale * norm.w + norm.b
            if hasattr(norm, "b")
            else x / scale * norm.w
        )

    return normed


def test_eap_ig_at_the_clean_endpoint_alone_is_eap(contrast_of):
    contrast = contrast_of({})
    close(contrast.scores("eap_ig", steps=1, endpoint="clean"), contrast.scores("eap"))
    others = [contrast.scores("eap_ig", steps=1, endpoint=e) for e in ("corrupted", "midpoint")]
    assert all(not torch.allclose(o, contrast.scores("eap"), atol=1e-3) for o in others)


def test_eap_ig_takes_the_mean_over_its_inputs(contrast_of):
    contrast = contrast_of({})
    batch = batch_of(contrast)
    at = {
        p: attributed(batch.wiring, batch.clean, losses_of(contrast, batch), (p,)).mean(0)
        for p in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    assert FIRST == {"clean": 1.0, "corrupted": 0.0, "midpoint": 0.5}
    close(contrast.scores("eap_ig", 4, "clean"), (at[0.25] + at[0.5] + at[0.75] + at[1.0]) / 4)
    close(contrast.scores("eap_ig", 4, "corrupted"), (at[0.0] + at[0.25] + at[0.5] + at[0.75]) / 4)
    close(contrast.scores("eap_ig", 2, "midpoint"), (at[0.25] + at[0.75]) / 2)


def test_eap_ig_out_of_the_embedding_sums_to_what_the_metric_loses(contrast_of):
    """Integrated gradients are complete: over a fine enough line they sum to the difference of the
    ends."""
    contrast = contrast_of({"activation": "gelu"})
    exists = contrast.graph.exists
    full, corrupted = contrast.values(torch.stack([exists, torch.zeros_like(exists)]))
    found = contrast.scores("eap_ig", steps=200, endpoint="midpoint")[0].sum()
    assert (full - corrupted).mean().abs() > 0.1
    torch.testing.assert_close(found, (full - corrupted).mean(), atol=1e-3, rtol=1e-2)


def test_the_sum_of_batches_is_the_whole(contrast_of, monkeypatch):
    whole = [contrast_of({}).scores(method) for method in ("eap", "eap_ig", "exact")]
    monkeypatch.setattr("mechmem.analyses.circuits.contrast.MOST_ROWS", 4)
    monkeypatch.setattr("mechmem.analyses.circuits.edges.MOST_ROWS", 7)
    for method, expected in zip(("eap", "eap_ig", "exact"), whole, strict=True):
        close(contrast_of({}).scores(method), expected)


def test_values_of_circuits_are_given_in_their_order_whatever_repeats(contrast_of):
    contrast = contrast_of({})
    graph = contrast.graph
    a, b = (graph.drawn(n, torch.Generator().manual_seed(n)) for n in (20, 30))
    one_by_one = torch.cat([contrast.values(c[None]) for c in (a, b, a, graph.exists)])
    close(contrast.values(torch.stack([a, b, a, graph.exists])), one_by_one)


def test_no_gradient_is_left_on_the_parameters(contrast_of):
    contrast = contrast_of({})
    contrast.scores("eap_ig")
    assert all(p.grad is None for p in contrast.model.parameters())
    assert not contrast.scores("eap_ig").requires_grad


def test_parameters_that_take_no_gradient_do_not_matter(contrast_of):
    expected = contrast_of({}).scores("eap")
    contrast = contrast_of({})
    contrast.model.requires_grad_(False)
    close(contrast.scores("eap"), expected)


def test_source_values_add_up_to_the_last_residual(model, pairs):
    graph = Graph.of(model)
    _, cache = model.run_with_cache(pairs.tokens)
    values = source_values(model, {hook: cache[hook] for hook in source_hooks(graph)})
    close(values.sum(0), cache["blocks.1.hook_resid_post"])


def test_the_table_has_a_row_for_each_edge_and_the_agreement(paired_session):
    table = EdgeScores(methods=("eap", "eap_ig", "exact")).table(paired_session)
    assert list(table) == list(EdgeScores.columns)
    assert len(table) == Graph(2, 2, 2, True).n_edges
    assert table["spearman_eap_ig"].unique().item() == pytest.approx(
        table["eap_ig"].corr(table["exact"], "spearman")
    )
    row = table[(table["source"] == "a0.h1") & (table["target"] == "a1.h0.k")].iloc[0]
    assert (row["source_layer"], row["layer"], row["into"]) == (0, 1, "k")
    left_out = {
        "exact",
        "spearman_eap",
        "spearman_eap_top",
        "spearman_eap_ig",
        "spearman_eap_ig_top",
    }
    assert list(EdgeScores().table(paired_session)) == [
        c for c in EdgeScores.columns if c not in left_out
    ]


def test_agreement_among_the_top_edges_is_of_those_with_the_largest_exact_score(
    paired_session, monkeypatch
):
    monkeypatch.setattr("mechmem.analyses.circuits.edge_scores.N_TOP", 10)
    table = EdgeScores(methods=("exact", "eap")).table(paired_session)
    top = table.reindex(table["exact"].abs().sort_values(ascending=False).index[:10])
    assert table["spearman_eap_top"][0] == pytest.approx(top["eap"].corr(top["exact"], "spearman"))


def test_scores_are_learnt_once_for_all_analyses(paired_session):
    EdgeScores(methods=("eap_ig",)).table(paired_session)
    before = paired_session.n_forwarded
    EdgeScores(methods=("eap_ig",), name="again").table(paired_session)
    assert paired_session.n_forwarded == before
    EdgeScores(methods=("eap_ig",), steps=4).table(paired_session)
    assert paired_session.n_forwarded > before


@pytest.fixture
def paired_session(model, pairs, others):
    return Session(
        models={"after": model, "before": model}, example_sets={"noisy": pairs, "clean": others}
    )


def test_what_has_no_slope_is_refused(paired_session):
    with pytest.raises(InputError, match="accuracy_true has no gradient"):
        EdgeScores(metric=Accuracy()).table(paired_session)
    clean = EdgeScores(
        metric=LogitDifference(), examples="clean", corrupted=Source(mean_over="noisy")
    )
    with pytest.raises(InputError, match="logit_difference is 0; take logit_true"):
        clean.table(paired_session)
    with pytest.raises(
        InputError, match=r"gradient of .* is zero on these examples.*choose another"
    ):
        EdgeScores(corrupted=Source(examples="noisy")).table(paired_session)


def test_sets_without_pairs_and_corrupted_runs_of_other_models_are_refused(
    paired_session, other_model
):
    with pytest.raises(InputError, match="pair"):
        EdgeScores(examples="clean").table(paired_session)
    session = Session(paired_session.models | {"before": other_model}, paired_session.example_sets)
    with pytest.raises(InputError, match="not another checkpoint"):
        EdgeScores(corrupted=Source(checkpoint="before")).table(session)


def test_exact_scores_need_no_gradient(paired_session):
    table = EdgeScores(methods=("exact",), metric=Accuracy(label="given")).table(paired_session)
    assert table["exact"].abs().max() <= 1


def test_a_distance_from_the_clean_run_has_a_slope_on_the_way_to_it_only(paired_session):
    with pytest.raises(InputError, match="gradient of kl is zero at the clean run"):
        EdgeScores(methods=("eap",), metric=KL()).table(paired_session)
    assert (
        EdgeScores(methods=("eap_ig",), metric=KL()).table(paired_session)["eap_ig"].abs().max()
        > 0.001
    )


@pytest.mark.parametrize(
    "analysis", [EdgeScores(), Circuit(), CircuitOverlap()], ids=lambda analysis: analysis.kind
)
def test_a_rotary_model_is_refused_in_one_line(analysis, pairs):
    session = Session({"after": configured(12, 14, **ROTARY)}, {"noisy": pairs})
    with pytest.raises(
        InputError, match="circuits are implemented only for models that"
    ) as refused:
        analysis.table(session)
    assert "its config has positional_embedding_type 'rotary'" in str(refused.value)
    assert "\n" not in str(refused.value)
