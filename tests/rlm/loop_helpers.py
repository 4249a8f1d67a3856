"""Short ways to say what a scripted root does."""

from rlm.fake_environment import FakeEnvironment
from rlm_runtime import RLM
from rlm_runtime.lms.base import Message, Reply, Usage
from rlm_runtime.lms.scripted import ScriptedLM


def cell(code):
    return f"Next step.\n```repl\n{code}\n```"


def done(expression):
    """A cell that hands in the value of a Python expression."""
    return cell(f"answer['content'] = {expression}\nanswer['ready'] = True")


def rlm(script, sub=None, **options):
    root = script if hasattr(script, "complete") else ScriptedLM(script, name="root")
    options.setdefault("environment", FakeEnvironment)
    return RLM(root, echo() if sub is None else sub, **options)


def echo(**options):
    """A sub-LM that says the last message back in capitals."""
    return ScriptedLM(lambda messages: messages[-1].content.upper(), name="sub", **options)


def types(result, node=None):
    return [e.type for e in result.events if node is None or e.node == node]


def told(lm, call=-1):
    """What the model was told last before its reply number `call`."""
    return lm.messages[call][-1].content


class CountingLM:
    """Replies `reply_tokens` tokens to every call unless its sampling allows fewer; counts exactly
    one token a word."""

    window = None

    def __init__(self, reply_tokens=10, usd_per_token=None, latency=None, name="counting"):
        self.name, self.reply_tokens, self.usd, self.latency = (
            name,
            reply_tokens,
            usd_per_token,
            latency,
        )
        self.calls = 0
        self.active = self.most = 0

    async def complete(self, messages, *, sampling=None, tools=(), schema=None, on_text=None):
        import asyncio

        self.calls += 1
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(self.latency or 0)
        finally:
            self.active -= 1
        n = self.reply_tokens
        if sampling.max_tokens is not None:
            n = min(n, sampling.max_tokens)
        spent = self.count_tokens(messages), n
        usage = Usage(calls=1, input_tokens=spent[0], output_tokens=n, cost_usd=self.price(*spent))
        return Reply(
            text=" ".join(["word"] * n),
            usage=usage,
            finish_reason="stop" if n == self.reply_tokens else "length",
        )

    def count_tokens(self, messages):
        return sum(len(m.content.split()) for m in messages)

    def price(self, input_tokens, output_tokens, cached_tokens=0):
        return None if self.usd is None else self.usd * (input_tokens + output_tokens)

    async def aclose(self):
        pass


def text_of(messages):
    return "\n".join(m.content for m in messages if isinstance(m, Message))
