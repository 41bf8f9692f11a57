"""What the compiler makes of the kernels for sm_90, without a device: no spills, tensor cores, wide copies."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bgcbench.kernels.tiles import Tile, sum_tiles, weight_tiles

triton = pytest.importorskip("triton")
BACKEND = Path(triton.__file__).parent / "backends" / "nvidia"
CUOBJDUMP = BACKEND / "bin" / "cuobjdump"
SHARED_BYTES = 227 * 1024
BATCH = 128
pytestmark = [
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump"),
    pytest.mark.skipif(
        tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6),
        reason="triton's interface for compiling ahead of time was another one before 3.6",
    ),
]


def cases() -> list[Any]:
    """Every candidate of half precision, the ones for ragged groups too, and the first ones of fp32."""
    parameters = []
    for numbers, width, most in (("half", 256, 9), ("half", 40, 1), ("tf32", 256, 2), ("ieee", 40, 1)):
        for kind in ("forward", "shared", "input", "weights"):
            if kind == "weights":
                found = weight_tiles(numbers, BATCH, width, width)
            else:
                found = sum_tiles(numbers, kind, BATCH, width, width)
            for tile in found[:most]:
                name = f"{numbers}-{kind}-{width}-{tile.m}x{tile.n}x{tile.k}-{tile.warps}w-{tile.stages}s"
                parameters.append(pytest.param(numbers, kind, width, tile, id=name))
    return parameters


def arguments(numbers: str, kind: str, width: int, tile: Tile) -> tuple[dict[str, str], dict[str, Any]]:
    """The pointers' types and the constants of one kernel."""
    half = numbers == "half"
    kept = "*bf16" if half else "*fp32"
    common = {
        "VEC": 8 if half else 4, "WIDE": False, "UPCAST": False, "PRECISION": "tf32" if numbers == "tf32" else "ieee",
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EVEN_N": width % tile.n == 0,
    }  # fmt: skip
    if kind == "weights":
        types = {"src": kept, "mean": kept, "grad": kept, "out": "*fp32", "out_mean": "*fp32"}
        return types, common | {"MEAN": True, "EVEN_B": BATCH % tile.k == 0, "EVEN_M": width % tile.m == 0}
    types = dict.fromkeys(("src", "mean", "weight", "weight_mean", "bias", "out"), kept)
    types |= {"addend": "*fp32", "scale": "fp32"}
    forward, absent = kind == "forward", {"addend"}
    if kind == "shared":
        types["out"] = "*fp32"
    if not forward:
        absent = {"mean", "weight_mean", "bias"} | ({"addend"} if kind == "shared" else set())
    constants = common | dict.fromkeys(absent) | {
        "BACKWARD": not forward, "K_MAJOR": forward or numbers == "tf32", "MEAN": forward, "BIAS": forward,
        "ADD": kind == "input", "EVEN_K": width % tile.k == 0,
    }  # fmt: skip
    return types, constants


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Tile) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (number,): [["tt.divisibility", 16]] for number, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("numbers", "kind", "width", "tile"), cases())
def test_the_machine_code(
    numbers: str, kind: str, width: int, tile: Tile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from bgcbench.kernels import programs

    if programs.INTERPRETED:
        pytest.skip("the kernels are the interpreter's here")
    kernel = programs.correlate_weights if kind == "weights" else programs.correlate
    found = compiled(kernel, *arguments(numbers, kind, width, tile), tile)
    assert found.metadata.shared <= SHARED_BYTES
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 ", usage), usage
    ptx = found.asm["ptx"]
    assert set(re.findall(r"st\.global(\S*)", ptx)) == {".v4.b32"}
    if numbers == "ieee":
        assert "mma" not in ptx  # fp32 products, none of them rounded to tf32
        return
    assert "wgmma.mma_async" in ptx
    # A step's product runs while the next one's operands arrive: no wait for all of them inside the loop.
    assert re.search(rf"wgmma.wait_group.sync.aligned {2 if kind == 'weights' else 1};", ptx)
    copies = {int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x\w+|\d+)", ptx)}
    # tf32's operands of the weight gradients must be turned on the way, four bytes at a time.
    assert copies == ({4} if (numbers, kind) == ("tf32", "weights") else {16})


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["mean", "add_parts"])
def test_the_small_kernels_move_16_bytes_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from bgcbench.kernels import programs

    if programs.INTERPRETED:
        pytest.skip("the kernels are the interpreter's here")
    if name == "mean":
        types, constants = {"x": "*bf16", "out": "*bf16"}, {"VEC": 8, "BLOCK_R": 32, "BLOCK_C": 64}
    else:
        types = {"partial": "*fp32", "partial_mean": "*fp32", "out": "*bf16", "out_mean": "*bf16"}
        constants = {"VEC": 4, "BLOCK": 1024, "MEAN": True}
    ptx = compiled(getattr(programs, name), types, {**constants, "WIDE": False}, Tile(0, 0, 0)).asm["ptx"]
    assert set(re.findall(r"ld\.global(\S*)", ptx)) == {".v4.b32"}
    assert set(re.findall(r"st\.global(\S*)", ptx)) == {".v4.b32" if name == "mean" else ".v2.b32"}
