"""The divided space-time tower once more, from the description alone: loops over clips, patches, frames,
heads and steps, float64, no batching, nothing of avion. Slow and plain, to hold the real one to.

`p` maps the tower's parameter names (without "visual.") to float64 tensors. Tokens are a dict from
(patch, frame) to a vector, so that no layout can be got wrong.
"""

import math

import torch


def layer_norm(x, p, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def activation(x, act):
    if act == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x / (1 + torch.exp(-1.702 * x))


def mlp(x, p, name, act):
    hidden = activation(p[f"{name}.fc1.weight"] @ x + p[f"{name}.fc1.bias"], act)
    return p[f"{name}.fc2.weight"] @ hidden + p[f"{name}.fc2.bias"]


def attention(row, p, name, heads):
    """row: list of vectors → list of vectors."""
    dim = len(row[0])
    size = dim // heads
    qkv = [p[f"{name}.Wqkv.weight"] @ x + p[f"{name}.Wqkv.bias"] for x in row]
    out = []
    for i in range(len(row)):
        parts = []
        for h in range(heads):
            q = qkv[i][h * size : (h + 1) * size]
            scores = torch.stack([q @ y[dim + h * size : dim + (h + 1) * size] for y in qkv]) / math.sqrt(size)
            weights = torch.exp(scores) / torch.exp(scores).sum()
            values = [y[2 * dim + h * size : 2 * dim + (h + 1) * size] for y in qkv]
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        out.append(p[f"{name}.out_proj.weight"] @ torch.cat(parts) + p[f"{name}.out_proj.bias"])
    return out


def silu(x):
    return x / (1 + torch.exp(-x))


def scan_direction(xs, p, name, suffix, a_name):
    """One direction of the mixer on a list of vectors, in the order in which they come."""
    conv, bias = p[f"{name}.conv1d{suffix}.weight"], p[f"{name}.conv1d{suffix}.bias"]
    taps = conv.shape[2]
    A, skip = -torch.exp(p[f"{name}.{a_name}"]), p[f"{name}.D{suffix}"]
    states = A.shape[1]
    rank = p[f"{name}.dt_proj{suffix}.weight"].shape[1]
    state, ys = torch.zeros_like(A), []
    for t in range(len(xs)):
        u = bias
        for back in range(min(taps, t + 1)):
            u = u + conv[:, 0, taps - 1 - back] * xs[t - back]
        u = silu(u)
        projected = p[f"{name}.x_proj{suffix}.weight"] @ u
        dt, B, C = projected[:rank], projected[rank : rank + states], projected[rank + states :]
        delta = torch.log1p(torch.exp(p[f"{name}.dt_proj{suffix}.weight"] @ dt + p[f"{name}.dt_proj{suffix}.bias"]))
        state = torch.exp(delta[:, None] * A) * state + (delta * u)[:, None] * B[None]
        ys.append(state @ C + skip * u)
    return ys


def vim(row, p, name):
    """row: list of vectors → list of vectors."""
    projected = [p[f"{name}.in_proj.weight"] @ h for h in row]
    inner = len(projected[0]) // 2
    xs, zs = [y[:inner] for y in projected], [y[inner:] for y in projected]
    forward = scan_direction(xs, p, name, "", "A_log")
    backward = scan_direction(xs[::-1], p, name, "_b", "A_b_log")[::-1]
    mixed = zip(forward, backward, zs, strict=True)
    return [p[f"{name}.out_proj.weight"] @ ((f + b) * silu(z)) for f, b, z in mixed]


def divided_block(cls, x, p, name, *, mixer, residual, heads, act):
    """cls: vector; x: {(patch, frame): vector} of one clip."""
    patches = sorted({n for n, _ in x})
    frames = sorted({t for _, t in x})
    normed = {at: layer_norm(v, p, f"{name}.norm3", 1e-6) for at, v in x.items()}
    mixed = {}
    if mixer == "vim_spacetime":
        order = [(n, t) for n in patches for t in frames]
        mixed = dict(zip(order, vim([normed[at] for at in order], p, f"{name}.time_mamba"), strict=True))
    else:
        for n in patches:
            row = [normed[n, t] for t in frames]
            out = (
                attention(row, p, f"{name}.timeattn", heads)
                if mixer == "attention"
                else vim(row, p, f"{name}.time_mamba")
            )
            mixed |= {(n, t): v for t, v in zip(frames, out, strict=True)}
    gate = torch.tanh(p[f"{name}.alpha_timeattn"])
    r = {at: x[at] + gate * mixed[at] for at in x}

    cls_of_frame, space = [], {}
    for t in frames:
        row = [layer_norm(v, p, f"{name}.norm1", 1e-6) for v in [cls, *(r[n, t] for n in patches)]]
        out = attention(row, p, f"{name}.attn", heads)
        cls_of_frame.append(out[0])
        space |= {(n, t): v for n, v in zip(patches, out[1:], strict=True)}
    cls = cls + sum(cls_of_frame) / len(frames)
    x = {at: (r if residual == "vanilla" else x)[at] + space[at] for at in x}

    cls = cls + mlp(layer_norm(cls, p, f"{name}.norm2", 1e-6), p, f"{name}.mlp", act)
    x = {at: v + mlp(layer_norm(v, p, f"{name}.norm2", 1e-6), p, f"{name}.mlp", act) for at, v in x.items()}
    return cls, x


def divided_features(video, p, *, mixer, residual, heads, depth, patch, act="gelu"):
    """video (B, C, T, height, width) → per clip the CLS (D,) and the tokens {(patch, frame): (D,)} after the last norm;
    as many frames and patches as the embeddings have."""
    kernel = p["patch_embed.proj.weight"].flatten(1)
    results = []
    for clip in video:
        x = {}
        for t in range(clip.shape[1]):
            n = 0
            for top in range(0, clip.shape[2], patch):
                for left in range(0, clip.shape[3], patch):
                    pixels = clip[:, t, top : top + patch, left : left + patch].reshape(-1)
                    x[n, t] = kernel @ pixels + p["pos_embed"][0, 1 + n]
                    if "temporal_embed" in p:
                        x[n, t] = x[n, t] + p["temporal_embed"][0, t]
                    n += 1
        x = {at: layer_norm(v, p, "ln_pre", 1e-5) for at, v in x.items()}
        cls = layer_norm(p["cls_token"][0, 0] + p["pos_embed"][0, 0], p, "ln_pre", 1e-5)
        for i in range(depth):
            cls, x = divided_block(cls, x, p, f"blocks.{i}", mixer=mixer, residual=residual, heads=heads, act=act)
        tokens = {at: layer_norm(v, p, "norm", 1e-6) for at, v in x.items()}
        results.append((layer_norm(cls, p, "norm", 1e-6), tokens))
    return results


def divided_tower(video, p, **kind):
    """video (B, C, T, height, width) → (B, E); `kind` as in `divided_features`."""
    return torch.stack([cls @ p["image_projection"] for cls, _ in divided_features(video, p, **kind)])
