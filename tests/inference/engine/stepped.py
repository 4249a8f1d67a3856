"""A service whose rounds the test runs itself, by a clock of its own."""

from dataclasses import dataclass, field

from mor_jax.inference.engine.request import Finished, PromptRead, Token
from mor_jax.inference.engine.service import EngineService, ServiceConfig
from mor_jax.inference.engine.stats import compiled_here

ROUNDS = 4000  # more than any schedule of the tests needs


class Stepped(EngineService):
    """Every round takes a second."""

    def __init__(self, device, *, control_of=None, eos=None, scorer=None, **config):
        self.now = 0.0
        super().__init__(
            device,
            ServiceConfig(**{"idle_s": 0.0, "keep_tokens": 1, **config}),
            control_of=control_of,
            eos=eos,
            scorer=scorer,
            clock=lambda: self.now,
        )

    def _begin(self):
        if not self._warm:
            self.warm_up()
            self.counts.watch(compiled_here())

    def step(self):
        self.now += 1
        going = self._round()
        self._tree.check()
        return going

    def run(self):
        for _ in range(ROUNDS):
            if not self.step():
                return
        raise AssertionError("requests do not end")

    def is_clean(self):
        """Nothing is held by anybody."""
        s = self._scheduler
        return (
            not s.running
            and not s.waiting
            and len(s.free) == self.device.lanes
            and self._tree.protected == 0
        )


@dataclass
class Heard:
    """What one request was told."""

    events: list = field(default_factory=list)
    ticket: object = None
    calls: int = 0

    def __call__(self, events):
        assert events and not self.over, "nothing after the last event"
        self.calls += 1
        self.events += events

    @property
    def over(self):
        return bool(self.events) and isinstance(self.events[-1], Finished)

    @property
    def end(self):
        assert self.over
        return self.events[-1]

    @property
    def tokens(self):
        return tuple(e.id for e in self.events if isinstance(e, Token))

    @property
    def depths(self):
        """Of the prompt (where asked for) and of the tokens before each drawn one."""
        return [d for e in self.events if isinstance(e, PromptRead) for d in e.depths] + [
            e.depth for e in self.events if isinstance(e, Token)
        ]


def ask(service, request):
    heard = Heard()
    heard.ticket = service.submit(request, heard)
    return heard
