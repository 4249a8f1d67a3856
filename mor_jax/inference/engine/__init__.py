"""The inference engine: many sequences at once, each token as deep as it needs.

    from mor_jax.inference.engine.build import build_service
    from mor_jax.inference.engine.request import Drawing, Request

    service = build_service(load_model("runs/mor"))
    ticket = service.submit(Request(tuple(ids), max_tokens=100, drawing=Drawing(temperature=0.0)),
        print)

`request.py` says what goes in and what comes out. From there down: `service.py` (any thread in, one
thread that works), `rounds.py` (dispatch, then read the round before), `scheduler.py` (who goes
where, and when), `prefix.py` (what prompts share), `device.py` (the compiled programs and their
state).
"""
