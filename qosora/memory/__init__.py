"""Memory of a training step: `plan` predicts it, `profile` measures it, `report` draws both.

Both run one step (`step`) under one tracer (`tracer`): `plan` on the meta device, where tensors have shapes and no
memory, `profile` on real ones.
"""
