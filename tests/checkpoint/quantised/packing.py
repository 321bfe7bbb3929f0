"""Packers of GPTQ and AWQ as their public descriptions say, value by value, and what they mean."""

import torch


def words(values, bits):
    """Pack rows of integers into 32-bit words, the lowest bits first, without gaps."""
    rows = []
    for row in values.tolist():
        stream = sum(value << (place * bits) for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        own = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
        rows.append([w - (1 << 32) if w >= 1 << 31 else w for w in own])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(codes, zeros, scales, bits, *, groups=None, one_less=True):
    """Return a layer's tensors: codes [in, out], zeros and scales [groups, out]."""
    stored = (zeros - 1) % (1 << bits) if one_less else zeros
    layer = {
        "qweight": words(codes.T, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scales,
    }
    return layer if groups is None else layer | {"g_idx": groups.to(torch.int32)}


def awq(codes, zeros, scales):
    """Return a layer's tensors in AutoAWQ's GEMM packing: codes [in, out]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # which output of eight stands at which place of a word

    def packed(values):
        rows = values.view(len(values), -1, 8)[:, :, order].flatten(1)
        return words(rows, 4)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}


def meant(codes, zeros, scales, groups):
    """Return the weight [out, in], entry by entry."""
    inputs, outputs = codes.shape
    weight = torch.empty(outputs, inputs, dtype=scales.dtype)
    for i in range(inputs):
        g = int(groups[i])
        for o in range(outputs):
            weight[o, i] = scales[g, o] * (int(codes[i, o]) - int(zeros[g, o]))
    return weight


def random_layer(inputs, outputs, bits, group, *, seed=0, dtype=torch.float16):
    """Return random codes, zero points and scales, and the group of every input."""
    made = torch.Generator().manual_seed(seed)
    count = inputs // group
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=made)
    zeros = torch.randint(0, 1 << bits, (count, outputs), generator=made)
    scales = (torch.rand(count, outputs, generator=made) * 0.1 + 0.01).to(dtype)
    return codes, zeros, scales, torch.arange(inputs) // group
