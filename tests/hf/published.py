"""The published models' forward pass in float64, after the papers and loop by loop: nothing of megahybrid.

Gated DeltaNet (Yang et al., arXiv 2412.06464), softmax attention, and native sparse attention with the choices of
He & Garner (arXiv 2510.20787): means as compression, K and V shared by all branches.
"""

import torch
import torch.nn.functional as F


def published_logits(config, tensors, ids):
    """int64 `[T]` → `[T, vocabulary]`, from config.json and the tensors by their published names."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    attn, eps = config["attn"] or {"layers": ()}, config["norm_eps"]
    x = weights["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{i}.")}
        mixer = {name.removeprefix("attn."): w for name, w in layer.items() if name.startswith("attn.")}
        inner = normalised(x, layer["attn_norm.weight"], eps)
        if i not in attn["layers"]:
            x = x + gated_deltanet(inner, mixer, config)
        elif attn.get("attn_type") == "nsa":
            x = x + native_sparse_attention(inner, mixer, attn)
        else:
            x = x + attention(inner, mixer, attn)
        inner = normalised(x, layer["mlp_norm.weight"], eps)
        gate, up, down = (layer[f"mlp.{name}_proj.weight"].mT for name in ("gate", "up", "down"))
        x = x + (F.silu(inner @ gate) * (inner @ up)) @ down
    output = "model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return normalised(x, weights["model.norm.weight"], eps) @ weights[output].mT


def normalised(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads(x, weights, name, head_dim):
    """`[T, heads, head_dim]` of a projection."""
    return (x @ weights[f"{name}_proj.weight"].mT).unflatten(-1, (-1, head_dim))


def gated_deltanet(x, weights, config):
    head_dim, taps, length = config["head_dim"], config["conv_size"], len(x)

    def convolved(name):
        """Depthwise and causal, then SiLU."""
        rows = F.pad(x @ weights[f"{name}_proj.weight"].mT, (0, 0, taps - 1, 0))
        kernel = weights[f"{name}_conv1d.weight"][:, 0]
        y = torch.stack([(rows[t : t + taps].mT * kernel).sum(-1) for t in range(length)])
        return F.silu(y).unflatten(-1, (-1, head_dim))

    q, k, v = convolved("q"), convolved("k"), convolved("v")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rate = weights["A_log"].exp() * F.softplus(x @ weights["a_proj.weight"].mT + weights["dt_bias"])
    beta = torch.sigmoid(x @ weights["b_proj.weight"].mT)
    state, o = torch.zeros(q.shape[1], head_dim, head_dim, dtype=x.dtype), []
    for t in range(length):
        state = state * (-rate[t]).exp()[:, None, None]
        error = v[t] - torch.einsum("hvk,hk->hv", state, k[t])
        state = state + torch.einsum("h,hv,hk->hvk", beta[t], error, k[t])
        o.append(torch.einsum("hvk,hk->hv", state, q[t]) * head_dim**-0.5)
    o = normalised(torch.stack(o), weights["o_norm.weight"], config["norm_eps"])
    return (o * F.silu(heads(x, weights, "g", head_dim))).flatten(1) @ weights["o_proj.weight"].mT


def rotated(x, theta):
    """Rotary embedding of `[T, heads, D]`: channel i turns with channel i + D / 2."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag], -1)


def attend(q, k, v):
    """One query head `[D]` to keys and values `[n, D]`."""
    return ((k @ q) * len(q) ** -0.5).softmax(0) @ v


def attention(x, weights, attn):
    head_dim = x.shape[-1] // attn["num_heads"]
    q, k, v = (heads(x, weights, name, head_dim) for name in "qkv")
    q, k = rotated(q, attn["rope_theta"]), rotated(k, attn["rope_theta"])
    groups, o = q.shape[1] // k.shape[1], torch.zeros_like(q)
    for t in range(len(x)):
        seen = slice(max(0, t + 1 - (attn["window_size"] or len(x))), t + 1)
        for h in range(q.shape[1]):
            o[t, h] = attend(q[t, h], k[seen, h // groups], v[seen, h // groups])
    return o.flatten(1) @ weights["o_proj.weight"].mT


def native_sparse_attention(x, weights, attn):
    head_dim, size = attn["head_dim"], attn["block_size"]
    q, k, v = (heads(x, weights, name, head_dim) for name in "qkv")
    q, k = rotated(q, attn["rope_theta"]), rotated(k, attn["rope_theta"])
    gates = torch.sigmoid(heads(x, weights, "g", 3))
    groups, o = q.shape[1] // k.shape[1], torch.zeros_like(q)
    means = [[y[at : at + size].mean(0) for at in range(0, len(x) // size * size, size)] for y in (k, v)]
    for t in range(len(x)):
        complete, window = (t + 1) // size, slice(max(0, t + 1 - attn["window_size"]), t + 1)
        for kv_head in range(k.shape[1]):
            of_group = range(kv_head * groups, (kv_head + 1) * groups)
            pooled_k, pooled_v = ([y[kv_head] for y in rows[:complete]] for rows in means)
            chosen = selected(q[t, of_group], pooled_k, t // size, attn["block_counts"])
            tokens = [j for block in chosen for j in range(block * size, (block + 1) * size) if j <= t]
            for h in of_group:
                if complete:
                    o[t, h] += gates[t, h, 0] * attend(q[t, h], torch.stack(pooled_k), torch.stack(pooled_v))
                o[t, h] += gates[t, h, 1] * attend(q[t, h], k[tokens, kv_head], v[tokens, kv_head])
                o[t, h] += gates[t, h, 2] * attend(q[t, h], k[window, kv_head], v[window, kv_head])
    return o.flatten(1) @ weights["o_proj.weight"].mT


def selected(q, pooled_k, own, count):
    """The blocks that the query heads `[G, D]` of a KV head read: the first, the own and the one before, and the best
    of the others by the sum of the heads' weights in compressed attention."""
    always = {0, max(0, own - 1), own}
    if not pooled_k:
        return always
    weights = ((q @ torch.stack(pooled_k).mT) * q.shape[-1] ** -0.5).softmax(-1).sum(0)
    others = sorted(set(range(own)) - always, key=lambda block: (-float(weights[block]), block))
    return always | set(others[: count - len(always)])
