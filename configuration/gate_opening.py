# Copyright 2026 The GatedLlama authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Start of gates: the bias that gives them their opening, and the scale with which an open gate is exactly 1.

A checkpoint carries this file for gates that its weights lack. Its config does not hold their bias, which is not just
a rounded logit(gate_init): about half of all bfloat16 numbers have no scale with which a gate is exactly 1.
"""

import math
from collections.abc import Iterator

import numpy as np


# Every element of an open gate's weight. Methods that divide by a weight's norms, such as DoRA, give NaN where it is 0.
# The number is too small to change a gate, and its square is still a normal float32 number. In float16 it rounds to 0.
OPEN_GATE_WEIGHT = 2.0**-60


def initial_gate_weight(gate_form: str = "multiplicative") -> float:
    """Return the number that fills a new gate's weight: OPEN_GATE_WEIGHT, for additive gates 0."""
    # An additive gate adds its logits, which 2**-60 would make something other than 0.
    return 0.0 if gate_form == "additive" else OPEN_GATE_WEIGHT


def initial_gate_bias(gate_init: float, gate_activation: str = "sigmoid", gate_form: str = "multiplicative") -> float:
    """
    Return the bias b, a bfloat16 number, with which a gate starts: activation(b) is `gate_init`, for additive gates 0.

    Raises:
        ValueError: if b does not exist, or the gate has no gradient there.
    """
    if gate_form == "additive":
        if gate_activation == "relu":
            raise ValueError(
                "gate_form='additive' with gate_activation='relu' and gate_bias=True: gates that add 0 at their start "
                "would have no gradient; with gate_bias=False they start at random"
            )
        return 0.0
    if gate_activation == "sigmoid":
        return open_gate(gate_init)[0]
    if gate_activation == "ns_sigmoid":
        if not 0.5 < gate_init < 1:
            raise ValueError(f"gate_init must be between 0.5 and 1 for gate_activation='ns_sigmoid', got {gate_init}")
        return open_gate(2 * gate_init - 1)[0]
    inverse = {"tanh": math.atanh, "silu": _inverse_silu}.get(gate_activation, float)
    bias = _to_bfloat16(inverse(gate_init))
    if bias == 0 or (gate_activation == "tanh" and np.tanh(np.float32(bias)) == 1):
        raise ValueError(
            f"gate_init={gate_init} is too close to {round(gate_init)} for gate_activation={gate_activation!r}"
        )
    return bias


def _inverse_silu(y: float) -> float:
    """Return the positive x for which x * sigmoid(x) = y."""
    x = y + 1.0
    for _ in range(20):  # Newton's steps: SiLU rises with a slope of at least 0.5 there
        sigmoid = 1 / (1 + math.exp(-x))
        x -= (x * sigmoid - y) / (sigmoid * (1 + x * (1 - sigmoid)))
    return x


def open_gate(gate_init: float) -> tuple[float, float]:
    """
    Return the bias b with which a gate starts open, and the scale s with which it then is the identity.

    b is logit(gate_init) rounded to bfloat16, or the nearest neighbour for which some float32 number s gives
    s * sigmoid(b) = 1 exactly in float32, for any exp that is right to one unit in the last place.

    Args:
        gate_init (`float`): the opening sigmoid(b) to start from, strictly between 0 and 1.

    Returns:
        `tuple[float, float]`: b and s. b is exact in bfloat16, float16 and float32, s in float32.

    Raises:
        ValueError: if gate_init is outside (0, 1), or so close to an end that a float32 sigmoid is 0 or 1 there.
    """
    if not 0 < gate_init < 1:
        raise ValueError(f"gate_init must be between 0 and 1, both excluded, got {gate_init}")
    for bias in _bfloat16_around(math.log(gate_init / (1 - gate_init))):
        if (scale := _identity_scale(bias)) is not None:
            return bias, scale
    raise ValueError(f"gate_init={gate_init} is too close to {round(gate_init)}: a float32 sigmoid is flat there")


def _bfloat16_around(x: float) -> Iterator[float]:
    """Yield the bfloat16 number nearest to x, then its neighbours; only 0 for an x close to 0."""
    if abs(x) < 2**-8:
        yield 0.0
        return
    nearest = _bfloat16_bits(x)
    for step in range(16):
        for candidate in (nearest + step, nearest - step):
            yield float(np.uint32(candidate << 16).view(np.float32))


def _to_bfloat16(x: float) -> float:
    return float(np.uint32(_bfloat16_bits(x) << 16).view(np.float32))


def _bfloat16_bits(x: float) -> int:
    """Return the bits of the bfloat16 number nearest to x."""
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # round half to even


def _identity_scale(bias: float) -> float | None:
    """Return the float32 number s for which s * 1 / (1 + e) = 1 for every e that a device may take for exp(-bias)."""
    if abs(bias) > 80:  # float32 exp overflows at 88
        return None
    exact = math.exp(-bias)
    nearest = np.float32(exact)
    # Vectorised exps are right to one unit in the last place; exp(0) = 1 is always exact.
    tolerance = 0.0 if float(nearest) == exact else float(np.spacing(nearest))
    around = (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf)))
    gates = [np.float32(1) / (np.float32(1) + e) for e in around if abs(float(e) - exact) <= tolerance]
    if not 0 < gates[0] < 1:
        return None
    scale = np.float32(1) / gates[0]
    for candidate in (scale, np.nextafter(scale, np.float32(0)), np.nextafter(scale, np.float32(np.inf))):
        if all(gate * candidate == 1 for gate in gates):
            return float(candidate)
    return None
