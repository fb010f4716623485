"""PyTorch's grouped matmul on the same shapes: a layer's products, and its experts."""

from gpu_parts import common


def measure(sizes: common.Sizes):
    """Rates of the three kinds of product and of the experts, without a routing."""
    try:
        import torch
    except ModuleNotFoundError:
        yield {"skipped": "PyTorch is not installed"}
        return
    if not torch.cuda.is_available():
        yield {"skipped": "PyTorch sees no GPU"}
        return
    yield {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    yield from rates(torch, sizes, "cuda", lambda _: torch.cuda.synchronize())


def rates(torch, sizes: common.Sizes, device: str, wait):
    """The rows on a device."""
    functional = torch.nn.functional
    grouped = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    n, d, f = sizes.dense, sizes.d_model, sizes.d_ff
    a, b = make(n, n), make(n, n)
    rate = 2.0 * n**3 / (common.timed(lambda: a @ b, wait)["ms"] / 1e3)
    yield {"dense_tflops": rate / 1e12}
    rows, experts = sizes.assignments, sizes.num_experts
    ends = torch.from_numpy(common.drawn(rows, experts)).cumsum(0)
    ends = ends.to(device, torch.int32)
    x, h, grad = make(rows, d), make(rows, f), make(rows, d)
    gate, up = (make(experts, f, d).requires_grad_() for _ in range(2))
    down = make(experts, d, f).requires_grad_()
    product = lambda given, w: grouped(given, w.mT, offs=ends)

    def forward_and_backward():
        given = x.detach().requires_grad_()
        hidden = functional.silu(product(given, gate)) * product(given, up)
        product(hidden, down).backward(grad)

    w = gate.detach()
    for name, call, flops in (
        ("gmm", lambda: product(x, w), sizes.product_flops),
        ("gmm, transposed", lambda: grouped(h, w, offs=ends), sizes.product_flops),
        ("tgmm", lambda: grouped(x.mT, h, offs=ends), sizes.product_flops),
        ("experts of a layer", forward_and_backward, sizes.layer_flops),
    ):
        row = {"kernel": name} | common.timed(call, wait)
        yield row | common.speed(flops, row["ms"], rate)
