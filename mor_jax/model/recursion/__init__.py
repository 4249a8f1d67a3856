"""The knobs of a recursion over a shared core, one a file: each value of a knob is one small part
with its paper named.

    state          before the first step        conditioning   on the number of the step
    injection      of the prelude's output      sampling       how many steps a training step runs
    loss           over the steps               exit           when a token stops at inference

`loop.Loop` puts the chosen ones together, and `unroll` runs them in training. A knob's file has
`CHOICES`, its values by the word that `config.recursion` takes; a new value is one entry there.
Letters: B rows, T time, D width, S steps.
"""
