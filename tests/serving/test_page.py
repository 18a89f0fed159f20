"""The page at /, in a browser."""

import os
import shutil
import urllib.parse

import pytest
from playwright import sync_api
from playwright.sync_api import expect

pytestmark = pytest.mark.slow
NAMES = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.fixture(scope='module')
def browser():
  path = os.environ.get('LLM_JAX_CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)
  if path is None:
    pytest.skip('no Chromium: export LLM_JAX_CHROMIUM=$(bash .ci/chromium /tmp/chromium)')
  expect.set_options(timeout=30_000)
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=path)
    yield found
    found.close()


@pytest.fixture
def opened(browser, serving):
  """The page of a service; nothing of it may go elsewhere or be kept."""
  with serving.running(serving.make()) as address:
    context = browser.new_context()
    shown = context.new_page()
    asked, wrong = [], []
    shown.on('request', lambda request: asked.append(request.url))
    shown.on('console', lambda said: wrong.append(said.text) if said.type == 'error' else None)
    shown.on('pageerror', lambda error: wrong.append(str(error)))
    shown.goto(f'{address}/')
    yield shown
    stored = shown.evaluate('JSON.stringify([localStorage, sessionStorage, document.cookie])')
    assert stored == '[{},{},""]'
    assert all(url.startswith((f'{address}/', 'data:,')) for url in asked)
    assert not any(serving.KEY in url for url in asked)
    # A browser notes each answer of status 400 and above, whatever the page does with it.
    assert [text for text in wrong if 'responded with a status of 40' not in text] == []
    context.close()


def enter(shown, key):
  shown.get_by_label('Key').fill(key)
  shown.get_by_role('button', name='Open').click()


def choose(shown, model, route):
  shown.get_by_label('Model').select_option(model)
  shown.get_by_label('Route').select_option(route)


def send(shown):
  shown.get_by_role('button', name='Send').click()
  expect(shown.get_by_role('button', name='Send')).to_be_enabled()


def test_a_key_is_needed(serving, opened):
  problem = opened.get_by_role('alert')
  expect(problem).to_contain_text('with a key that is known, is needed')
  enter(opened, 'nobody-knows-it')
  expect(problem).to_contain_text('with a key that is known, is needed')
  expect(opened.locator('main')).to_be_hidden()
  enter(opened, serving.KEY)
  expect(problem).to_be_hidden()
  names = opened.get_by_label('Model').locator('option')
  expect(names).to_have_text(list(serving.models))
  choose(opened, 'reader', '/classify')
  routes = opened.get_by_label('Route').locator('option')
  expect(routes).to_have_text(['/classify', '/v1/embeddings', '/tokenize'])


def test_a_text_is_classified(serving, opened):
  enter(opened, serving.KEY)
  choose(opened, 'reader', '/classify')
  text = '3 some <b>good</b> text'
  opened.get_by_label('Text', exact=True).fill(text)
  send(opened)
  (wanted,) = serving.models['reader'].session.predict([text])
  answer = opened.get_by_role('log')
  expect(answer.locator('.text')).to_have_text(wanted['label'])
  ordered = sorted(wanted['probabilities'].items(), key=lambda pair: -pair[1])
  rows = [row.inner_text().split() for row in answer.get_by_role('row').all()]
  assert [name for name, _ in rows] == [name for name, _ in ordered]
  shares = pytest.approx([share for _, share in ordered], abs=1e-4)
  assert [float(share) for _, share in rows] == shares
  bars = answer.locator('meter').all()
  assert [bar.evaluate('bar => bar.value') for bar in bars] == shares


def test_a_conversation_is_streamed(serving, opened):
  enter(opened, serving.KEY)
  choose(opened, 'writer', '/v1/chat/completions')
  opened.get_by_label('Most tokens').fill('12')
  opened.get_by_label('Seed').fill('3')
  writer, messages = serving.models['writer'].session, []
  shown = opened.get_by_role('log').locator('.text')
  for text in ('hello', '<i>more</i>'):
    message = opened.get_by_label('Message')
    message.fill(text)
    with opened.expect_response('**/v1/chat/completions') as response:
      message.press('Control+Enter')
    assert response.value.headers['content-type'].startswith('text/event-stream')
    expect(opened.get_by_role('button', name='Send')).to_be_enabled()
    expect(message).to_be_focused()
    messages.append({'role': 'user', 'content': text})
    said = writer.chat(messages, max_new_tokens=12, seed=3, temperature=1.0)
    messages.append({'role': 'assistant', 'content': said})
    assert [one.text_content() for one in shown.all()] == [one['content'] for one in messages]
  assert opened.locator('#raw').text_content().count('chat.completion.chunk') > 3
  opened.get_by_role('button', name='New conversation').click()
  expect(shown).to_have_count(0)


def test_an_error_is_shown_in_the_words_of_the_service(serving, opened):
  enter(opened, serving.KEY)
  choose(opened, 'writer', '/v1/completions')
  text, problem = opened.get_by_label('Text', exact=True), opened.get_by_role('alert')
  text.fill('a' * 300)
  send(opened)
  expect(problem).to_contain_text('shorten')
  text.fill('hello')
  opened.get_by_label('Most tokens').fill('9')
  opened.get_by_label('Temperature').fill('0')
  send(opened)
  expect(problem).to_be_hidden()
  (wanted,) = serving.models['writer'].session.complete(['hello'], max_new_tokens=9, temperature=0)
  assert opened.get_by_role('log').text_content() == wanted


CASES = {  # made-up answers: the fields that are filled in, an output, and what is seen of it
  '/tag': (
    {'Text': '😀 Ulm <'},
    {'entities': [{'label': 'CITY', 'start': 2, 'end': 5}]},
    '😀 UlmCITY <',
  ),
  '/qa': (
    {'Question': 'where?', 'Text that answers it': 'in Ulm'},
    {'answer': 'Ulm', 'start': 3, 'end': 6, 'probability': 0.5},
    'Ulmin Ulm0.5000',
  ),
  '/rerank': (
    {'Query': 'q', 'Passages, one in a line': 'one\n\ntwo'},
    {'scores': [0.1, 2], 'ranking': [1, 0]},
    'two (2.0000)one (0.1000)',
  ),
  '/similarity': ({'Text': 'a', 'Second text': 'b'}, {'score': 0.25}, '0.25'),
  '/fill': (
    {'Text with [MASK]': 'a [MASK]'},
    {'text': 'a b', 'masks': [[['b', 0.75]]]},
    'a bb0.7500',
  ),
}


def test_answers_of_other_kinds(serving, opened):
  said = {path: {'outputs': [output]} for path, (_, output, _) in CASES.items()}
  said['/v1/models'] = {'data': [{'id': 'all', 'routes': [*CASES]}]}
  fulfill = lambda route: route.fulfill(json=said[urllib.parse.urlsplit(route.request.url).path])
  for path in said:
    opened.route(f'**{path}', fulfill)
  enter(opened, serving.KEY)
  for path, (texts, _, seen) in CASES.items():
    choose(opened, 'all', path)
    for label, text in texts.items():
      opened.get_by_label(label, exact=True).fill(text)
    with opened.expect_request(f'**{path}') as request:
      send(opened)
    (record,) = request.value.post_data_json['inputs']
    flat = ' '.join([record] if isinstance(record, str) else map(str, record.values()))
    assert all(line in flat for text in texts.values() for line in text.split('\n'))
    assert opened.get_by_role('log').text_content() == seen
  choose(opened, 'all', '/tag')
  expect(opened.locator('#json')).to_be_hidden()


def test_no_other_script_may_run(browser, serving):
  with serving.running(serving.make()) as address:
    shown = browser.new_page()
    policy = shown.goto(f'{address}/').headers['content-security-policy']
    assert 'unsafe' not in policy and "default-src 'none'" in policy
    with shown.expect_console_message(lambda said: 'Content Security Policy' in said.text):
      shown.evaluate(
        """const script = document.createElement('script');
        script.textContent = 'window.ran = true';
        document.body.append(script)"""
      )
    assert shown.evaluate('window.ran') is None
    shown.close()
