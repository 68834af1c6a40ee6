"""sm121a_matmul: the product against fp64 on awkward matrices, the table, the tuner's choice, and the swap on models."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from products import DEVICE, SMALL, assert_is_product, normal
from torch import Tensor, nn

from kernels.registry import select
from loop import lora
from loop.config import Config, DataConfig, LoraConfig
from loop.errors import UserError
from loop.model import load_model
from negative_results.sm121a_matmul import OPTIMIZATION, op, table, tune
from negative_results.sm121a_matmul.dispatch import DispatchedLinear, Engine, linear
from negative_results.sm121a_matmul.kernel import matmul
from negative_results.sm121a_matmul.patch import ENGINE, apply, eligible, plain_linears
from negative_results.sm121a_matmul.table import Entry, bucket, device_key
from negative_results.sm121a_matmul.tile import TILES, Tile

VOCABULARY = 128
ENTRY = Entry(device_key(DEVICE), "float32", "y", 64, 384, 128, SMALL, True, 1.2, 1.1, 1.3, 48, "torch 2.11, Triton 3.7.1")


@pytest.mark.parametrize("tile", [SMALL, *TILES], ids=str)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (130, 70, 65), (257, 33, 128)], ids=str)
def test_sizes_that_no_block_divides(tile, M, N, K):
    a, b = normal(M, K), normal(K, N, seed=1)
    assert_is_product(matmul(a, b, tile), a, b)


@pytest.mark.parametrize("group", range(1, 20))
def test_every_block_is_computed_once_however_many_there_are(group):
    """Rows of blocks below, at and above the size of a group, and beyond two of them."""
    a, b = normal(16 * group - 3, 19), normal(19, 70, seed=1)
    assert_is_product(matmul(a, b, SMALL), a, b)


@pytest.mark.parametrize("turned_a", [False, True])
@pytest.mark.parametrize("turned_b", [False, True])
def test_any_strides_without_a_copy(turned_a, turned_b):
    a, b = normal(41, 2 * 29)[:, ::2], normal(29, 60, seed=1)[:, 5:52]
    a = a.t().contiguous().t() if turned_a else a
    b = b.t().contiguous().t()[:, 1:] if turned_b else b
    assert_is_product(matmul(a, b, SMALL), a, b)
    expanded = normal(1, 29, seed=2).expand(41, 29)  # the gradient that a sum sends back
    assert_is_product(matmul(expanded, b, SMALL), expanded, b)


def test_what_lies_beyond_the_edges_is_not_read():
    """A NaN one element past each edge would reach a product that reads it, masked or not."""
    a, b = (torch.full((70, 80), math.nan, device=DEVICE) for _ in range(2))
    a[:33, :37], b[:37, :41] = normal(33, 37), normal(37, 41, seed=1)
    assert_is_product(matmul(a[:33, :37], b[:37, :41], SMALL), a[:33, :37], b[:37, :41])


def test_empty_matrices():
    assert matmul(normal(0, 5), normal(5, 3)).shape == (0, 3)
    assert matmul(normal(4, 5), normal(5, 0)).shape == (4, 0)
    assert torch.equal(matmul(normal(4, 0), normal(0, 3)), torch.zeros(4, 3, device=DEVICE))


def test_the_same_bits_every_time():
    a, b = normal(50, 300), normal(300, 40, seed=1)
    first = matmul(a, b, SMALL)
    assert all(torch.equal(matmul(a, b, SMALL), first) for _ in range(3))


def test_refuses_what_it_cannot_compute():
    one = normal(2, 3)
    for wrong in (normal(2, 3), normal(3), normal(3, 2).bfloat16()):
        with pytest.raises(ValueError, match=r"\[M, K\] and \[K, N\].*\[2, 3\]"):
            matmul(one, wrong)
    with pytest.raises(ValueError, match="float64"):
        matmul(one.double(), normal(3, 2).double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bf16 is truncated in Triton's interpreter")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("T, D, O", [(5376, 2048, 6144), (5375, 1024, 3584), (257, 72, 200)], ids=str)
def test_the_layers_products_in_bf16(tile, T, D, O):
    x, weight, dy = (normal(*size, dtype=torch.bfloat16, seed=len(size)) for size in ((T, D), (O, D), (T, O)))
    for a, b in ((x, weight.t()), (dy, weight), (dy.t(), x)):
        assert_is_product(matmul(a, b, tile), a, b)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 64 << 30, reason="needs a GPU with 64 GiB of memory"
)
def test_offsets_beyond_2_to_the_31():
    rows, width = 66_000, 32_768  # the last rows of a, and of c, lie beyond
    a, b = (torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a[-64:], small = normal(64, width, dtype=torch.bfloat16), normal(width, 64, seed=1, dtype=torch.bfloat16)
    assert torch.equal(matmul(a, small)[-64:], matmul(a[-64:].clone(), small))
    b[-64:] = normal(64, width, dtype=torch.bfloat16)
    short = normal(64, 32, seed=2, dtype=torch.bfloat16)
    assert torch.equal(matmul(short.t(), b[-64:]), matmul(short.t(), b[-64:].clone()))
    tall, wide = normal(rows, 16, dtype=torch.bfloat16), normal(16, width, seed=3, dtype=torch.bfloat16)
    assert torch.equal(matmul(tall, wide)[-64:], matmul(tall[-64:].clone(), wide))


def ours(kind: str, left: Tensor, right: Tensor) -> Tensor:
    return matmul(left, right, SMALL)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_layer_s_gradients(trained):
    x, weight = normal(3, 7, 20).requires_grad_(), normal(11, 20, seed=1).requires_grad_(trained)
    dy = normal(3, 11, 7, seed=2).transpose(1, 2)  # not contiguous
    wanted = [value for value in (x, weight) if value.requires_grad]
    got, want = linear(x, weight, ours), F.linear(x, weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy))


def test_no_product_that_nobody_asked_for():
    asked = []

    def recording(kind: str, left: Tensor, right: Tensor) -> Tensor:
        asked.append(kind)
        return torch.mm(left, right)

    x, weight = normal(5, 6).requires_grad_(), normal(4, 6, seed=1)
    y = linear(x, weight, recording)
    assert [saved is None for saved in y.grad_fn.saved_tensors] == [True, False]  # x is not kept for a frozen weight
    y.sum().backward()
    assert asked == ["y", "dx"]
    linear(x.detach(), weight.requires_grad_(), recording).sum().backward()
    assert asked[2:] == ["y", "dw"]


def test_traces_without_a_graph_break():
    layer = DispatchedLinear(nn.Linear(20, 11, bias=False, device=DEVICE), ENGINE, {(p, 8): SMALL for p in table.PRODUCTS})
    x = normal(7, 20).requires_grad_()
    compiled = torch.compile(lambda value: layer(value + 1).square().sum(), backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(layer(x + 1).square().sum(), (x, layer.weight))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), (x, layer.weight)), want)


def test_a_well_behaved_custom_op():
    arguments = (normal(9, 20).t(), normal(9, 11, seed=1), list(SMALL))
    assert set(torch.library.opcheck(torch.ops.isoloss.sm121a_matmul.default, arguments).values()) == {"SUCCESS"}


def test_each_tile_is_gated_and_the_op_calls_the_kernel_without_a_table():
    called = []

    def recording(a: Tensor, b: Tensor, tile: Tile) -> Tensor:
        called.append(tile)
        return torch.mm(a, b)

    spied = op.matmul_op(dataclasses.replace(ENGINE, matmul=recording))
    tiled = [workload for workload in spied.workloads if "tile" in workload.shape]
    for workload in tiled:
        y = spied.candidate(*spied.inputs(workload, torch.device("cpu"), 0))
        y.sum().backward()
    assert called == [tile for tile in TILES for _ in table.PRODUCTS]
    called.clear()
    (small,) = (workload for workload in spied.workloads if workload.name == "small, frozen")
    spied.candidate(*spied.inputs(small, torch.device("cpu"), 0)).sum().backward()
    assert called == [TILES[0]] * 2


def test_the_table_that_ships_is_read_and_written_alike(tmp_path):
    shipped = table.load(ENGINE.table)
    assert [entry for entry in shipped if entry.tile not in TILES] == []
    table.save(tmp_path / "negative_results" / "sm121a_matmul" / "table.toml", shipped)
    assert (tmp_path / "negative_results" / "sm121a_matmul" / "table.toml").read_bytes() == ENGINE.table.read_bytes()


def test_a_new_measurement_takes_the_place_of_an_old_one(tmp_path):
    path = tmp_path / "table.toml"
    other = dataclasses.replace(ENTRY, product="dx", device='a "device"', tile=TILES[0]._replace(specialised=True))
    table.save(path, table.merged([ENTRY], [other]))
    assert sorted(table.load(path), key=lambda entry: entry.product) == [other, ENTRY]
    slower = dataclasses.replace(ENTRY, wins=False, ratio=0.9)
    assert table.merged(table.load(path), [slower]) == sorted([slower, other], key=lambda entry: entry.key)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('product = "y"', 'product = "dy"', "one of y, dx, dw is expected"),
        ("rows = 64", 'rows = "64"', "rows is '64'; a int is expected"),
        ("wins = true", "wins = 1", "wins is 1; a bool is expected"),
        ("wins = true\n", "", "the keys device, dtype"),
        ("tile = [16,", "tile = [", "6 whole numbers are expected: BM, BN"),
        ("[[entry]]", "[entry]", r"tables \[\[entry\]\] are expected"),
        ("rows = 64", "rows = ", "can't be read"),
    ],
)
def test_a_wrong_table_is_one_clear_line(tmp_path, old, new, said):
    path = tmp_path / "table.toml"
    table.save(path, [ENTRY])
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=rf"table\.toml: .*{said}"):
        table.load(path)


def test_rows_share_the_measurement_of_their_power_of_two():
    assert [bucket(rows) for rows in (0, 1, 2, 3, 4096, 4097, 5376, 8192)] == [1, 1, 2, 4, 4096, 8192, 8192, 8192]


def test_a_win_is_one_device_s_dtype_s_and_shape_s():
    weight = torch.empty(384, 128, requires_grad=False)
    assert table.winners([ENTRY], ENTRY.device, weight) == {("y", 64): SMALL}
    assert table.winners([ENTRY], "another", weight) == table.winners([ENTRY], ENTRY.device, weight.bfloat16()) == {}
    assert table.winners([ENTRY], ENTRY.device, weight.t()) == {}
    assert table.winners([dataclasses.replace(ENTRY, wins=False)], ENTRY.device, weight) == {}
    dw = dataclasses.replace(ENTRY, product="dw")
    assert table.winners([dw], ENTRY.device, weight) == {}
    assert table.winners([dw], ENTRY.device, weight.requires_grad_()) == {("dw", 64): SMALL}
    loses = dataclasses.replace(ENTRY, wins=False)
    assert table.fastest([loses], ENTRY.device, weight, 40) == {"y": SMALL} and not table.fastest(
        [loses], ENTRY.device, weight, 4
    )


def engine_with(tmp_path: Path, *entries: Entry, takes=lambda a, b: True) -> tuple[Engine, list]:
    """An engine whose table holds the entries, and the list of (rows, tile) that it was asked for."""
    table.save(tmp_path / "table.toml", entries)
    asked = []

    def recording(a: Tensor, b: Tensor, tile: Tile) -> Tensor:
        asked.append((len(a), tile))
        return matmul(a, b, tile)

    return dataclasses.replace(ENGINE, table=tmp_path / "table.toml", matmul=recording, takes=takes), asked


def run_of(method: str, model: str = "qwen3.5-shallow-tiny", pack_length: int = 48) -> SimpleNamespace:
    config = Config(model=model, device=DEVICE.type, dtype="float32", data=DataConfig(pack_length=pack_length))
    built = load_model(config, VOCABULARY)
    if method == "lora":
        lora.attach(built, LoraConfig(rank=4), seed=0)
    return SimpleNamespace(model=built, device=DEVICE, config=config)


def entries_for(run: SimpleNamespace) -> list[Entry]:
    """A win for every product of every layer."""
    shapes = {tuple(layer.weight.shape) for layer in plain_linears(run.model).values()}
    return [
        dataclasses.replace(ENTRY, product=product, out_features=out, in_features=wide, tile=TILES[0])
        for out, wide in sorted(shapes)
        for product in table.PRODUCTS
    ]


def outcome(run: SimpleNamespace) -> list[Tensor]:
    ids = torch.arange(48, device=DEVICE)[None]
    loss = run.model(ids, labels=ids).loss
    return [loss, *torch.autograd.grad(loss, [p for p in run.model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_swap_keeps_the_parameters_and_the_function(method, tmp_path):
    run = run_of(method)
    engine, asked = engine_with(tmp_path, *entries_for(run))
    before, state, layers = dict(run.model.named_parameters()), list(run.model.state_dict()), plain_linears(run.model)
    want = outcome(run)
    assert eligible(run, engine) is None
    apply(run, engine)
    swapped = {name for name, module in run.model.named_modules() if isinstance(module, DispatchedLinear)}
    assert swapped == set(layers) and "lm_head" in swapped
    assert any(name.endswith(".gate_proj.base_layer" if method == "lora" else ".gate_proj") for name in swapped)
    assert not any(".lora_A" in name or ".lora_B" in name for name in swapped)
    after = dict(run.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(run.model.state_dict()) == state and run.model.training
    got = outcome(run)
    assert asked and {tile for _, tile in asked} == {TILES[0]}
    assert method == "lora" or len(asked) == 3 * len(layers)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert eligible(run, engine).endswith("has no plain nn.Linear without a bias")
    copy.deepcopy(run.model)(torch.arange(8, device=DEVICE)[None])


def test_only_what_won_is_swapped_and_the_rest_is_cublas_s(tmp_path):
    run = run_of("lora")
    engine, asked = engine_with(tmp_path, ENTRY, dataclasses.replace(ENTRY, product="dx", rows=128))
    apply(run, engine)
    swapped = {name: m for name, m in run.model.named_modules() if isinstance(m, DispatchedLinear)}
    assert swapped and all((m.out_features, m.in_features) == (384, 128) for m in swapped.values())
    layer, stock = next(iter(swapped.values())), functools.partial(F.linear, weight=next(iter(swapped.values())).weight)
    for rows, expected in ((48, [(48, SMALL)]), (33, [(33, SMALL)]), (100, [(100, SMALL)]), (20, [])):
        asked.clear()
        x = normal(rows, 128, seed=rows).requires_grad_()
        y = layer(x)
        dx = torch.autograd.grad(y, x, torch.ones_like(y))
        assert asked == expected  # y from 33 to 64 rows, dx from 65 to 128
        torch.testing.assert_close(y, stock(x))
        torch.testing.assert_close(dx, torch.autograd.grad(stock(x), x, torch.ones_like(y)))
        assert rows != 20 or torch.equal(y, stock(x))


def test_what_the_engine_does_not_take_is_cublas_s(tmp_path):
    run = run_of("full")
    engine, asked = engine_with(tmp_path, *entries_for(run), takes=lambda a, b: False)
    want = outcome(run)
    apply(run, engine)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outcome(run), want, strict=True)) and not asked


def test_what_is_watched_or_has_a_bias_stays_as_it_is():
    model = nn.Sequential(*(nn.Linear(128, 384, bias=index == 0) for index in range(3)))
    model[1].register_forward_hook(lambda module, arguments, output: output)
    assert list(plain_linears(model)) == ["2"]


def test_refuses_with_the_reason(tmp_path, monkeypatch):
    run = run_of("lora")
    engine, _ = engine_with(tmp_path / "negative_results" / "sm121a_matmul")
    reason = eligible(run, engine)
    assert reason.startswith(f"no shape of this model has a measured win on this device ({device_key(DEVICE)}, 48 rows)")
    assert "python -m negative_results.sm121a_matmul.tune" in reason
    with pytest.raises(ValueError, match=r"has no nn\.Linear with a measured win"):
        apply(run, engine)
    elsewhere, _ = engine_with(tmp_path, dataclasses.replace(ENTRY, device="NVIDIA GB10, sm_121"))
    assert "no shape of this model" in eligible(run, elsewhere)
    other_rows, _ = engine_with(tmp_path, dataclasses.replace(ENTRY, rows=4096))
    assert "no shape of this model" in eligible(run, other_rows)
    biased = SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2)), device=DEVICE, config=run.config)
    assert eligible(biased, engine) == "Sequential has no plain nn.Linear without a bias"
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert "TRITON_INTERPRET=1" in eligible(SimpleNamespace(model=run.model, device=torch.device("cpu")), engine)


@pytest.mark.parametrize("other", ["full_ft_linear", "lora_matmul", "static_lora", "tma_matmul"])
def test_others_want_the_same_layers(other):
    with pytest.raises(UserError, match="can't be on together"):
        select(["sm121a_matmul", other])
    assert OPTIMIZATION.name == "sm121a_matmul"


def clock(speed: dict) -> tune.Sample:
    """A sampler that runs nothing: cuBLAS takes 100 µs, a tile what `speed` says, and every call drifts a little."""
    drift = count()

    def sample(call: tune.Call) -> float:
        tile = call.__closure__ and next(
            (cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, Tile)), None
        )
        return speed.get(tile, 100.0) * (1 + 0.001 * next(drift))

    return sample


@pytest.mark.parametrize(("fastest", "wins"), [(80.0, True), (100.0, False), (130.0, False)])
def test_the_tuner_takes_the_fastest_tile_and_says_whether_it_wins(fastest, wins):
    left, right = tune.Problem("dx", 33, 40, 24).operands(DEVICE, torch.float32)
    choice = tune.measured(ENGINE, left, right, clock(dict.fromkeys(TILES, 150.0) | {TILES[3]: fastest}), pairs=20)
    assert choice.tile == TILES[3] and choice.wins is wins
    assert choice.ratio == pytest.approx(100 / fastest, rel=0.02) and choice.ratio_low <= choice.ratio <= choice.ratio_high
    problem = tune.Problem("dx", 33, 40, 24)
    assert ("128 x 128 x 32, 4 warps, 4 stages" in tune.line(problem, choice)) is wins
    kept = tune.entry(problem, choice, "a GPU")
    assert (kept.wins, kept.tile, kept.rows, kept.measured_rows, kept.dtype) == (wins, TILES[3], 64, 33, "bfloat16")


def test_the_tuner_leaves_out_what_is_wrong_and_what_does_not_fit(capsys):
    from triton.runtime.errors import OutOfResources

    def broken(a: Tensor, b: Tensor, tile: Tile) -> Tensor:
        if tile == TILES[0]:
            raise OutOfResources(200_000, 101_376, "shared memory")
        return torch.mm(a, b) * (math.nan if tile == TILES[1] else 1.05 if tile == TILES[2] else 1.0)

    speed = dict.fromkeys(TILES[:3], 10.0) | {TILES[4]: 50.0}
    left, right = tune.Problem("y", 33, 40, 24).operands(DEVICE, torch.float32)
    choice = tune.measured(dataclasses.replace(ENGINE, matmul=broken), left, right, clock(speed), pairs=10)
    assert choice.tile == TILES[4]
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"left out: {tile} is ") for line, tile in zip(said, TILES[1:3], strict=True)] == [True, True]
    refusing = dataclasses.replace(ENGINE, takes=lambda a, b: False)
    assert tune.measured(refusing, left, right, clock({}), pairs=10) is None
    assert "no tile computes it" in tune.line(tune.Problem("y", 33, 40, 24), None)


@pytest.mark.parametrize(
    ("product", "strides"), [("y", ((24, 1), (1, 24))), ("dx", ((40, 1), (24, 1))), ("dw", ((1, 40), (24, 1)))]
)
def test_the_tuner_measures_what_a_layer_has_in_memory(product, strides):
    left, right = tune.Problem(product, 33, 40, 24).operands(DEVICE)
    assert (left.stride(), right.stride()) == strides
    weight, x = normal(40, 24, seed=1).requires_grad_(), normal(33, 24).requires_grad_()
    seen = {}

    def recording(kind: str, a: Tensor, b: Tensor) -> Tensor:
        seen[kind] = a.shape, b.shape, a.stride(), b.stride()
        return torch.mm(a, b)

    linear(x, weight, recording).backward(normal(33, 40, seed=2))
    assert seen[product] == (left.shape, right.shape, *strides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would measure for minutes")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "torch sees no CUDA device"), (["--pairs", "1"], "--pairs 1: at least")],
    ids=["no GPU", "pairs"],
)
@pytest.mark.parametrize("folder", ["negative_results.sm121a_matmul", "negative_results.tma_matmul"])
def test_the_command_says_in_one_line_what_it_needs(folder, arguments, said):
    words = [sys.executable, "-m", f"{folder}.tune", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2])
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
    )
