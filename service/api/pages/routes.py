"""The pages for people, on the API's listener: which address shows what, who may see it, and the
headers that keep a browser safe."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Container
from urllib.parse import parse_qsl, quote

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from betrace.service.api.endpoint import Tools
from betrace.service.api.errors import ApiError, translate
from betrace.service.api.pages import forms, rules, signals, traces
from betrace.service.api.pages.overview import overview
from betrace.service.api.pages.renderer import ASSETS, Templates
from betrace.service.api.pages.sessions import SESSION_SECONDS, Sessions
from betrace.service.api.pages.undecided import undecided_list
from betrace.service.api.pages.visit import Page, Viewer, Visit
from betrace.service.tenancy.authentication import (
    Authenticator,
    Denied,
    claimed_tenant,
    closed_tenant,
)

_log = logging.getLogger("service.http")

PREFIX = "page "
"""Begins the names of the routes of pages."""
SESSION_COOKIE = "betrace_session"
MOST_FIELDS = 50
_FORM = "application/x-www-form-urlencoded"
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

Handler = Callable[..., Awaitable[Page]]

_PAGES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", overview),
    ("GET", "/live", signals.live),
    ("GET", "/signals", signals.signal_list),
    ("GET", "/signals/<signal_id>", signals.signal_page),
    ("POST", "/signals/<signal_id>/acknowledge", forms.acknowledge),
    ("GET", "/traces", traces.trace_list),
    ("GET", "/traces/<trace_id>", traces.trace_page),
    ("GET", "/traces/<trace_id>/spans/<span_id>", traces.span_page),
    ("GET", "/undecided", undecided_list),
    ("GET", "/rules", rules.rule_list),
    ("GET", "/rules/<rule_id>", rules.rule_page),
    ("POST", "/rules/<rule_id>/mute", forms.mute),
    ("POST", "/rules/<rule_id>/unmute", forms.unmute),
    ("GET", "/rule-editor", rules.editor),
    ("POST", "/rule-editor", rules.edit),
    ("POST", "/rule-editor/check", rules.check),
)


_READING_FORMS = ("/rule-editor", "/rule-editor/check")
"""Forms that readers may send; saving is refused there."""


def add_pages(
    app: QuartTrio, tools: Tools, authenticator: Authenticator | None, closed: Container[str]
) -> Callable[[ApiError], Awaitable[Response]]:
    """Add all pages to the application of the API. Returns the view of an error."""
    pages = _Pages(tools, authenticator, closed)
    for method, path, handler in _PAGES:
        _route(app, method, path, pages.view(handler))
    _route(app, "GET", "/sign-in", pages.sign_in_form)
    _route(app, "POST", "/sign-in", pages.sign_in)
    _route(app, "POST", "/sign-out", pages.sign_out)
    _route(app, "GET", "/assets/<version>/<name>", _asset)
    _route(app, "GET", "/favicon.ico", _icon)
    return pages.show_error


def _route(
    app: QuartTrio, method: str, path: str, view: Callable[..., Awaitable[Response]]
) -> None:
    app.add_url_rule(
        path,
        endpoint=f"{PREFIX}{method} {path}",
        view_func=view,
        methods=[method],
        provide_automatic_options=False,
    )


class _Pages:
    """Identifies who looks, and answers."""

    def __init__(
        self, tools: Tools, authenticator: Authenticator | None, closed: Container[str]
    ) -> None:
        self._tools = tools
        self._authenticator = authenticator
        self._closed = closed
        self._sessions = Sessions()
        self._templates = Templates()
        settings = tools.sources.settings
        self._secure = bool(settings.tls.certificate) or settings.api.public_url.startswith("https")

    def view(self, handler: Handler) -> Callable[..., Awaitable[Response]]:
        """The view of a page: its handler, for whoever may see it."""

        async def view(**path: str) -> Response:
            return await self._answer(lambda visit: handler(visit, **path))

        return view

    # Who looks

    async def _visit(self) -> Visit:
        """The request. Raises :exc:`ApiError` if the viewer may not make it."""
        args = dict(request.args.items())
        scope = args.pop("tenant", None) or request.headers.get("x-scope-orgid")
        session = request.cookies.get(SESSION_COOKIE, "")
        known = self._sessions.authorization(session) if session else None
        authorization = request.headers.get("authorization") or known
        tenant = await self._tenant(authorization, scope)
        if isinstance(tenant, str) and tenant in self._closed:
            tenant = closed_tenant(tenant)
        if isinstance(tenant, Denied):
            raise ApiError(tenant.status, tenant.message)
        viewer = Viewer(
            tenant,
            scope,
            session if known else "",
            signed_in=known is not None,
            may_change=not isinstance(await self._tenant(authorization, scope, False), Denied),
            name=request.cookies.get(forms.NAME_COOKIE, "")[:64],
        )
        return await self._request(viewer, args)

    async def _tenant(
        self, authorization: str | None, scope: str | None, reads: bool = True
    ) -> str | Denied:
        """The tenant that is looked at, or without ``reads`` changed; empty for an operator who has
        not chosen one."""
        if self._authenticator is None:
            return claimed_tenant(scope)
        if authorization is None:
            return Denied(401, "sign in to see this page")
        if scope is None and await self._is_operator(authorization):
            return ""
        return await self._authenticator.caller(authorization, scope, reads=reads)

    async def _is_operator(self, authorization: str) -> bool:
        assert self._authenticator is not None
        return await self._authenticator.operator(authorization, reads=True) is None

    async def _request(self, viewer: Viewer, args: dict[str, str]) -> Visit:
        form = await _form() if request.method == "POST" else {}
        return Visit(
            self._tools,
            self._templates,
            viewer,
            request.path,
            args,
            form,
            request.remote_addr or "",
            self._sessions.form_token(viewer.session),
        )

    async def _nobody(self) -> Visit:
        """The request of someone whose name does not matter."""
        args = dict(request.args.items())
        return await self._request(Viewer(""), args)

    # Answers

    async def _answer(self, act: Callable[[Visit], Awaitable[Page]]) -> Response:
        visit: Visit | None = None
        try:
            try:
                visit = await self._visit()
                if request.method == "POST":
                    self._check_form(visit)
                if not visit.viewer.tenant:
                    return self._write(await _choose_tenant(visit))
                return self._write(await act(visit))
            except (ApiError, HTTPException):
                raise
            except Exception as error:
                known = translate(error)
                if known is not None:
                    raise known from error
                raise
        except ApiError as error:
            return await self._refuse(error, visit)
        except HTTPException as error:
            return await self._refuse(ApiError(error.code or 500, str(error.description)), visit)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return await self._refuse(ApiError(500, "the page cannot be shown"), visit)

    async def show_error(self, error: ApiError) -> Response:
        """The page of an error that has nothing to do with a tenant."""
        return await self._refuse(error, None)

    async def _refuse(self, error: ApiError, visit: Visit | None) -> Response:
        if error.status == 401 and request.method == "GET":
            wanted = quote(request.full_path.rstrip("?"), safe="")
            return self._write(Page(status=303, location=f"/sign-in?next={wanted}"))
        if visit is None:
            nobody = Viewer("")
            visit = Visit(self._tools, self._templates, nobody, "/", {}, {}, "", "")
        body = visit.render("error.html", forms.problem(error))
        return self._write(Page(body, error.status, headers=dict(error.headers)))

    def _check_form(self, visit: Visit) -> None:
        _same_origin()
        if not self._sessions.is_form_token(visit.viewer.session, visit.form.get("form_token", "")):
            raise ApiError(403, "this form is out of date", "go back, reload the page, send again")
        if not visit.viewer.may_change and visit.path not in _READING_FORMS:
            raise ApiError(403, "your token can only read", "sign in with another token")

    def _write(self, page: Page) -> Response:
        response = Response(page.body, page.status, content_type=page.media_type)
        response.headers.update(HEADERS | page.headers)
        if page.location is not None:
            response.headers["location"] = page.location
        for name, (value, seconds) in page.cookies.items():
            response.set_cookie(
                name,
                value,
                max_age=seconds,
                path="/",
                secure=self._secure,
                httponly=True,
                samesite="Lax",
            )
        return response

    # Signing in

    async def sign_in_form(self) -> Response:
        """The form that asks for the token."""
        visit = await self._nobody()
        return self._show_sign_in(visit, visit.args.get("next", "/"))

    def _show_sign_in(self, visit: Visit, following: str, problem: str = "") -> Response:
        values = {"next": forms.local(following) or "/", "problem": problem}
        values["needed"] = "yes" if self._authenticator is not None else ""
        body = visit.render("sign_in.html", values)
        return self._write(Page(body, 401 if problem else 200))

    async def sign_in(self) -> Response:
        """Exchange a token for a session."""
        try:
            _same_origin()
            visit = await self._nobody()
        except ApiError as error:
            return await self._refuse(error, None)
        following = forms.local(visit.form.get("next", "")) or "/"
        if self._authenticator is None:
            return self._write(Page(status=303, location=following))
        authorization = f"Bearer {visit.form.get('token', '').strip()}"
        if not await self._is_operator(authorization):
            tenant = await self._authenticator.tenant(authorization, reads=True)
            if isinstance(tenant, Denied):
                return self._show_sign_in(visit, following, tenant.message)
        page = Page(status=303, location=following)
        session = self._sessions.open(authorization)
        page.cookies[SESSION_COOKIE] = (session, SESSION_SECONDS)
        return self._write(page)

    async def sign_out(self) -> Response:
        """End the session."""
        session = request.cookies.get(SESSION_COOKIE, "")
        try:
            _same_origin()
            form = await _form()
            if self._sessions.is_form_token(session, form.get("form_token", "")):
                self._sessions.close(session)
        except ApiError as error:
            return await self._refuse(error, None)
        page = Page(status=303, location="/sign-in")
        page.cookies[SESSION_COOKIE] = ("", 0)
        return self._write(page)


async def _form() -> dict[str, str]:
    """The fields of a form. Raises :exc:`ApiError`."""
    if request.mimetype != _FORM:
        raise ApiError(415, f"a form must be sent as {_FORM}")
    body = await request.get_data(False, False, False)
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict"
        )
    except ValueError:
        raise ApiError(400, "the form cannot be read") from None
    return dict(pairs)


def _same_origin() -> None:
    """Refuse forms of other origins; old browsers send no header that says it."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "this form was sent by a page of another origin")


async def _choose_tenant(visit: Visit) -> Page:
    """An operator chooses the tenant to look at."""
    found, _ = await visit.tools.tenants.page("", 1000)
    names = [tenant["name"] for tenant in found if tenant["state"] in ("active", "implicit")]
    return Page(visit.render("tenants.html", {"names": names}))


async def _asset(version: str, name: str) -> Response:
    """A file whose address changes with its contents, so it may be kept for ever."""
    data, media_type = ASSETS.files.get(name, (b"", ""))
    if not media_type or version != ASSETS.version:
        return Response(b"", 404, content_type="text/plain")
    response = Response(data, content_type=media_type)
    response.headers.update(HEADERS | {"cache-control": "public, max-age=31536000, immutable"})
    return response


async def _icon() -> Response:
    """The icon, where browsers look for it if a page is not HTML, as that of a span."""
    data, media_type = ASSETS.files["icon.svg"]
    response = Response(data, content_type=media_type)
    response.headers.update(HEADERS | {"cache-control": "public, max-age=86400"})
    return response
