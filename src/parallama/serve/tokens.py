"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..model.token_ids import check_ids
from .answers import Text, Tokens
from .calls import body_of, in_thread
from .errors import ApiError
from .protocol import DetokenizeRequest, TokenizeRequest
from .served_model import ServedModel


async def tokenize(request: Request) -> Response:
    """Token ids of a text or a conversation."""
    asked, served = await body_of(request, TokenizeRequest)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError("expected one of prompt and messages", param="prompt")
    return JSONResponse(await in_thread(_tokens, asked, served))


def _tokens(asked: TokenizeRequest, served: ServedModel) -> Tokens:
    if asked.prompt is None:
        ids = served.rendered(asked)
    else:
        ids = served.encoded(asked.prompt, asked.add_special_tokens is not False)
    return {
        "count": len(ids),
        "max_model_len": served.serving.llm.max_model_len,
        "tokens": ids,
        "token_strs": [served.texts.text(token) for token in ids]
        if asked.return_token_strs
        else None,
    }


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    asked, served = await body_of(request, DetokenizeRequest)
    return JSONResponse(await in_thread(_text, asked, served))


def _text(asked: DetokenizeRequest, served: ServedModel) -> Text:
    llm = served.serving.llm
    if llm.tokenizer is None:
        raise ApiError("the model has no tokenizer", param="tokens")
    check_ids(asked.tokens, llm.plan.model.vocab)
    return {"prompt": str(llm.tokenizer.decode(asked.tokens))}
