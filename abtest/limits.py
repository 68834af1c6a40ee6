"""Every number that the gate decides by, in one place. Never widened for a candidate.

They come from a benign catalogue: honest rewrites, thirteen and more of them with eight seeds each, on a small model; in
bf16 from 600 such runs on an H200. Each limit leaves the worst of them room, since a maximum grows with the number of runs.
`python -m abtest.sensitivity` measures it again on any device and publishes how close the worst honest rewrite came to each
limit, and which planted defects each limit caught.
"""

from __future__ import annotations

# 2, gradients beside an oracle: the candidate's error over the reference's, pooled over the probes of a state.
# The worst parameter. Honest rewrites in bf16 came to 1.55: a matrix of a few rows, one a head, whose error is that of a few
# tokens. The prototype's 1.5 was too near to that.
RHO = 2.0
# The worst one with less than 64 elements in all layers together: a dozen numbers, in which the reference's own error may be
# small by luck. Honest rewrites on an H200 came to 3.3, and to 4.6 at the overfit state. No planted defect needs this check
# alone.
RHO_FEW = 6.0
GEOMEAN = 1.15  # the geometric mean over parameters
# The worst row of any parameter, for the same reason: honest rewrites came to 5.0. Garbage in a row is off by hundreds.
ROW = 8.0
# A relative gradient error that counts as none, of either arm: some eighty roundings in fp32. One ill-conditioned token
# makes fp32 errors of one arm ten times the other's by luck; in bf16 every error is far above this.
NOTHING = 1e-5
# A row's error counts as at least so much of the mean row's, and of the mean row's in proportion to their gradients. A tenth
# flagged FLA on rows without a gradient; without the proportion FLA came to 7.7 in full fine-tuning at the 2B shape, in a
# convolution's rows of four numbers.
ROW_FLOOR = 0.3
ALPHA = 0.003  # scale error <g, g*> / |g*|^2 beside the reference's, where it is significant
ALPHA_BETTER = 0.006  # the same where the candidate is nearer to the truth; by more, the reference itself is in doubt
ALPHA_T = 5.0  # significant: Student's t, paired over ten probes or more
# Over fewer probes, by their number, the t that chance exceeds as rarely as 5.0 over ten: once in 1350 parameters. With 5.0
# one parameter in 26 would be called significant over three probes. A scale error of 1 % has t = 777.
ALPHA_T_FEW = {3: 36.8, 4: 14.3, 5: 9.3, 6: 7.3, 7: 6.3, 8: 5.7, 9: 5.3}
# At the overfit state gradients are what is left of p - 1. The weights were trained until the reference's own rounding was
# small there, and an honest rewrite's was not: it is further off in most parameters, by up to 1.6 and 2.5 in the worst.
RHO_OVERFIT, RHO_FEW_OVERFIT, GEOMEAN_OVERFIT = 4.0, 10.0, 2.5

# 3, one optimizer update beside fp64.
UPDATE = 1e-5  # relative error of an update, of a moment, of accumulated gradients, and of the norm before clipping
RATE = 1e-6  # relative error of the learning rate, which is double arithmetic

# 4, loss of the free run in units of the noise floor.
LOSS_SIGMA, LOSS_SUM_SIGMA = 6.0, 4.0
STEP_SIZE = 0.01  # length of a step's update beside the reference's, relative; honest rewrites are off by 2e-4 in bf16
FP32_ULP = 2.0**-23  # of a loss, relative: below it no difference can be told from rounding the loss itself

# 1, what the comparison itself needs.
# Per batch. A prototype's 0.05 held for 4 layers; bf16 alone gives 0.053 at 24 layers of 512 and 0.076 at 24 of 2048. That
# the reference is the right function is what PACKING shows, in arithmetic that hides nothing.
REFERENCE_ERROR = 0.15
PACKING = 1e-3  # the reference's packed path beside unpacked documents, in the oracle's arithmetic
RECURRENCE = 1e-3  # the oracle's chunked delta rule beside the recurrence
SHARE = 0.4  # of the parameters that must have an oracle gradient; LoRA's A has none while B is zero
