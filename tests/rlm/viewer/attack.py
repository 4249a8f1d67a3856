"""A trajectory in which every text tries to become something else: markup, script, terminal codes,
other text."""

from rlm_runtime.lms.base import Message, ToolCall, Usage
from rlm_runtime.repl.base import Answer, CellError, CellResult
from rlm_runtime.trajectory import (
    Asked,
    BudgetNote,
    CellEnd,
    CellStart,
    Compacted,
    ContextLoaded,
    NodeEnd,
    NodeStart,
    Nudged,
    Replied,
    RunEnd,
    RunStart,
    SandboxUp,
)

RUN = "window.__pwned=(window.__pwned||0)+1;alert(1)"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script></pre></details><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>",
    f"<svg/onload='{RUN}'><style>*{{display:none}}</style>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<!--<script>{RUN}//--></script>",
    f"<a href='javascript:{RUN}'>click</a><meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    f"{{{{constructor.constructor('{RUN}')()}}}} ${{{RUN}}} `;{RUN};//",
    f"';{RUN};// \";{RUN};//\\u0022;{RUN};//",
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m \x9b31m \x1b]8;;javascript:alert(1)\x07x\x1b]8;;\x07",
    "safe\u202egnp.exe\u2066\u2069 \u200b\u200f\ufeff \u2028line\u2029para \x00nul \x08\x7f \ud800 \udfff",
    "Z" + "\u0300\u0301\u0302\u0303" * 300 + "algo",
    "W" * 300_000,
    "\x1b" * 50_000,
    "<b>\n" * 20_000,
    "__proto__ constructor toString hasOwnProperty </title></style></textarea></noscript>",
]


def events():
    """Each payload in each field a text can be in."""
    first = PAYLOADS[0]
    found = [
        RunStart(
            run=first,
            started_at=first,
            question=" ".join(PAYLOADS[:9]),
            root=PAYLOADS[1],
            sub=PAYLOADS[2],
            settings={PAYLOADS[3]: PAYLOADS[4]},
            budget={PAYLOADS[1]: PAYLOADS[0]},
        ),
        ContextLoaded(
            kind=PAYLOADS[1],
            name="context",
            chars=1,
            path=PAYLOADS[2],
            blob=first,
            sha256=first,
            preview=PAYLOADS[10],
        ),
        SandboxUp(
            environment=PAYLOADS[2],
            layers={PAYLOADS[0]: PAYLOADS[3], "landlock": first},
            start_seconds=0.1,
        ),
    ]
    t = 0.0
    for turn, payload in enumerate(PAYLOADS, 1):
        call, child = f"0.{2 * turn - 1}", f"0.{2 * turn}"
        tool = ToolCall(
            id=payload[:50], name=payload[:2000], arguments={payload[:50]: payload[:2000]}
        )
        at = {"t": t}
        t += 1
        found += [
            Asked(
                turn=turn,
                messages=(
                    Message(role="system", content=payload),
                    Message(role="user", content=payload),
                ),
                **at,
            ),
            Replied(
                turn=turn,
                message=Message(
                    role="assistant",
                    content=f"<think>{payload}</think>{payload}\n```repl\n{payload}\n```",
                    tool_calls=(tool,),
                ),
                raw=payload,
                discarded=3,
                finish_reason=payload[:500],
                usage=Usage(calls=1, input_tokens=5),
                **at,
            ),
            CellStart(turn=turn, cell=1, code=payload, **at),
            NodeStart(
                node=call,
                parent="0",
                kind="lm",
                model=payload[:500],
                depth=1,
                turn=turn,
                cell=1,
                prompt=payload,
                question=payload,
                **at,
            ),
            NodeEnd(node=call, value={payload[:500]: [payload]}, **at),
            NodeStart(
                node=child,
                parent="0",
                kind="rlm",
                model=payload[:500],
                depth=1,
                turn=turn,
                cell=1,
                prompt=payload,
                question=payload,
                **at,
            ),
            CellStart(node=child, turn=1, cell=1, code=payload, **at),
            NodeEnd(node=child, error=payload, kind=payload[:500], **at),
            CellEnd(
                turn=turn,
                cell=1,
                t=t,
                result=CellResult(
                    status="error",
                    stdout=payload,
                    stderr=payload,
                    lost=payload,
                    error=CellError(type=payload[:300], message=payload[:3000], traceback=payload),
                    answer=Answer(content={payload[:300]: payload}, ready=True),
                    variables={payload[:300]: payload[:3000]},
                ),
            ),
            Nudged(turn=turn, reason=payload[:300], text=payload, t=t),
            Compacted(turn=turn, tokens_before=2, tokens_after=1, summary=payload, t=t),
            BudgetNote(used={payload[:300]: 1.0}, refused=payload[:300], t=t),
        ]
    found.append(
        RunEnd(
            stop_reason=PAYLOADS[0],
            answer=PAYLOADS[2],
            error=PAYLOADS[1],
            t=t,
            seconds=t,
            turns=len(PAYLOADS),
        )
    )
    return found
