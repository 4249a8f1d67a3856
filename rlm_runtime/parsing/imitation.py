"""Output and turns that only the runtime can write, found in what the model wrote after a cell."""

from __future__ import annotations

import re

MARK = re.compile(
    r"""^[ \t]*+(?:
    [*_\#>`\[(=-]{0,8}+[ \t]*+
        (?:(?:repl|cell|code|execution|console|program|standard|python|actual|sample|printed|terminal|interpreter|script)[ ]){0,2}
        (?:output|result|stdout|stderr|observation|printout)s?
        (?:[ ](?:of|from|for|in|after)[ ][^\n:]{0,60})?[ \t]*+[\])*_`=-]{0,8}+[ \t]*+:
    |[*_\#>`\[(=-]{0,8}+[ \t]*+(?:user|human|system|assistant|tool|environment|ipython|repl|function)[ \t]*+[\])*_`]{0,4}+[ \t]*+:
    |[\[(=*-]{1,8}+[ \t]*+(?:(?:repl|cell|code|execution|console|python)[ ])?(?:output|result|stdout)s?[^\n:]{0,60}[\])=*-]{1,8}+[ \t]*+$
    |\#{1,6}[ ](?:repl|cell|code|execution)?[ ]?(?:user|human|output|result|observation)s?[ \t:]*+$
    |>>>[ ]|Out[ ]?\[\d{1,6}\]:|In[ ]?\[\d{1,6}\]:
    |Traceback[ ]\(most[ ]recent[ ]call[ ]last\)
    |\[?turn[ ]\d{1,6}[ ]of[ ]\d
    |</?(?:output|stdout|stderr|result|results|tool_response|tool_result|function_results?|function_response|observation
        |execution_results?|repl_output|interpreter_output|code_output|console_output|python_output|user|human)>
    |(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>)[ ]?(?:user|human|system|tool|assistant|ipython|model|environment|python)
    |\[INST\]
    )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# The end of the reply as the model's own template has it: whatever follows is another turn, played
# by the model.
END = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|endoftext|end_of_text|return|end)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>"
)
SHOWS = re.compile(
    r"output|print|result|return|show|display|gives?\b|get\b|see\b|yield|produce", re.I
)


def marker(prose: str) -> int | None:
    """Where in the prose after a cell the imitation begins, or None."""
    mark = MARK.search(prose)
    end = END.search(prose)
    places = [mark.start()] if mark else []
    if end and prose[end.end() :].strip():
        places.append(end.start())
    return min(places, default=None)


def follows_as_output(prose: str) -> bool:
    """Whether a block without code after this prose (all that stands between it and a cell) plays
    the cell's output."""
    return not prose.strip() or bool(SHOWS.search(prose[-300:]))
