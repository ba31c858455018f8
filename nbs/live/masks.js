// The live figure: two sentences, the masks of three kinds of dropout, and their mean.
// `data` comes from masks.py: every mask was drawn by the real modules, for 11 values of p and 100 seeds.

const SVG = 'http://www.w3.org/2000/svg';
const CELL = 16, LABEL = 40, GAP = 8, TOP = 22;
const TITLES = {batch: 'word type', sequence: 'per sentence', token: 'position', number: 'number'};

function make(parent, name, attributes = {}, text = '') {
  const isSvg = parent.namespaceURI === SVG || name === 'svg';
  const node = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

// Whether number `column` of word `row` is kept by the mask of `kind`.
function isKept(data, kind, state, row, column) {
  const mask = data.masks[kind][state.p][state.seed];
  return (parseInt(mask[row], 16) >> column & 1) === 1;
}

// The seeds that the mean is over: the last hundred masks that were shown.
function lastSeeds(state) {
  const first = Math.max(0, state.drawn - 100);
  return Array.from({length: state.drawn - first}, (_, i) => (first + i) % 100);
}

// The mean over the last masks of the share of each word's numbers that is kept.
function meanKept(data, kind, state, row) {
  const shares = lastSeeds(state).map(seed => {
    const columns = [...Array(data.dims).keys()];
    return columns.filter(c => isKept(data, kind, {...state, seed}, row, c)).length / data.dims;
  });
  return shares.reduce((a, b) => a + b, 0) / shares.length;
}

function masksFigure(root, data) {
  root.dataset.ready = 'yes';
  root.replaceChildren();
  const words = data.sentences.flat();
  const state = {p: 3, seed: 0, drawn: 1, perSequence: false, word: null};
  const kinds = () => [state.perSequence ? 'sequence' : 'batch', 'token', 'number'];
  const sentenceOf = row => row < data.sentences[0].length ? 1 : 2;
  const rowY = row => TOP + row * CELL + (sentenceOf(row) === 2 ? GAP : 0);

  // Controls
  const controls = make(root, 'div', {class: 'masks-controls'});
  const pLabel = make(controls, 'label', {}, 'p ');
  const slider = make(pLabel, 'input', {type: 'range', min: 0, max: data.ps.length - 1, step: 1, value: state.p});
  const pValue = make(pLabel, 'output', {class: 'masks-p'});
  const newMask = make(controls, 'button', {type: 'button', class: 'masks-new'}, 'New mask');
  const hundred = make(controls, 'button', {type: 'button', class: 'masks-hundred'}, '100 masks');
  const sequenceLabel = make(controls, 'label');
  const sequence = make(sequenceLabel, 'input', {type: 'checkbox', class: 'masks-sequence'});
  sequenceLabel.append(' one draw per sentence');

  // Three panels of masks
  const panels = make(root, 'div', {class: 'masks-panels'});
  const height = rowY(words.length) + 4;
  const drawn = kinds().map((_, i) => {
    const svg = make(panels, 'svg', {viewBox: `0 0 ${LABEL + data.dims * CELL + 8} ${height}`, role: 'group'});
    const title = make(svg, 'text', {x: 0, y: 13, class: 'title'});
    const rows = words.map((word, row) => {
      const group = make(svg, 'g', {class: 'row', 'data-word': word});
      make(group, 'rect', {class: 'halo', x: 0, y: rowY(row), width: LABEL + data.dims * CELL + 6, height: CELL});
      make(group, 'text', {x: LABEL - 6, y: rowY(row) + 12, 'text-anchor': 'end'}, word);
      const cells = Array.from({length: data.dims}, (_, column) =>
        make(group, 'rect', {x: LABEL + column * CELL + 1, y: rowY(row) + 1, width: CELL - 2, height: CELL - 2}));
      group.addEventListener('pointerenter', () => light(word));
      group.addEventListener('pointerleave', () => light(focusedWord()));
      group.addEventListener('click', () => light(word));
      if (i === 0) keyboard(group, row);
      return {group, cells};
    });
    return {svg, title, rows};
  });

  // The first panel's words take the focus; arrow keys go from one to the next.
  function keyboard(group, row) {
    group.setAttribute('tabindex', row === 0 ? 0 : -1);
    group.setAttribute('role', 'button');
    group.setAttribute('aria-label', `word ${row + 1}, ${words[row]}: show its copies`);
    group.addEventListener('focus', () => light(words[row]));
    group.addEventListener('blur', () => light(null));
    group.addEventListener('keydown', event => {
      const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      const next = drawn[0].rows[(row + step + words.length) % words.length].group;
      group.setAttribute('tabindex', -1);
      next.setAttribute('tabindex', 0);
      next.focus();
    });
  }

  // The strip of means
  const strip = make(root, 'div', {class: 'masks-strip'});
  const BAR = 26, HIGH = 70;
  const width = words.length * BAR + 34;
  const means = make(strip, 'svg', {viewBox: `0 0 ${width} ${HIGH + 56}`, role: 'img'});
  make(means, 'text', {x: 0, y: 13, class: 'title'}, 'Mean factor of each word');
  make(means, 'text', {x: 28, y: HIGH / 2 + 27, 'text-anchor': 'end'}, '1');
  make(means, 'line', {class: 'wanted', x1: 32, x2: width, y1: HIGH / 2 + 22, y2: HIGH / 2 + 22});
  const bars = words.map((word, row) => {
    const x = 34 + row * BAR;
    make(means, 'text', {x: x + 9, y: HIGH + 38, 'text-anchor': 'middle'}, word);
    return {scaled: make(means, 'rect', {class: 'bar mean', x, width: 10}),
            plain: make(means, 'rect', {class: 'bar plain-mean', x: x + 11, width: 7})};
  });
  make(means, 'rect', {class: 'mean', x: 34, y: HIGH + 45, width: 9, height: 9});
  make(means, 'text', {x: 47, y: HIGH + 54}, 'scaled by 1/(1-p)');
  make(means, 'rect', {class: 'plain-mean', x: 170, y: HIGH + 45, width: 9, height: 9});
  make(means, 'text', {x: 183, y: HIGH + 54}, 'without the scale');

  const say = make(root, 'p', {class: 'masks-say', 'aria-live': 'polite'});

  function light(word) {
    state.word = word;
    for (const {rows} of drawn)
      for (const {group} of rows) group.classList.toggle('lit', group.dataset.word === word);
    describe();
  }

  // The word that has the keyboard's focus, if one of this figure has it.
  function focusedWord() {
    const focused = document.activeElement;
    return root.contains(focused) ? focused.dataset.word : null;
  }

  // The sentence below the figure: what the first panel drops, and either the word that is lit or the bars.
  function describe() {
    const start = `Mask ${state.seed + 1} of 100 at p = ${data.ps[state.p]}.`;
    say.textContent = `${start} ${aboutDropped()} ${state.word ? aboutWord(state.word) : aboutBars()}`;
  }

  function aboutDropped() {
    const unit = state.perSequence ? 'Sentence by sentence' : 'By word type';
    const dropped = [...words.keys()].filter(row => !isKept(data, kinds()[0], state, row, 0));
    if (!dropped.length) return `${unit}, this mask drops nothing.`;
    const which = state.perSequence ? quoteBySentence(dropped) : quote(dropped);
    return `${unit}, this mask drops ${which}: ${dropped.length} of ${words.length} words.`;
  }

  function quote(rows) {
    return [...new Set(rows.map(row => `“${words[row]}”`))].join(', ');
  }

  function quoteBySentence(rows) {
    const sentences = [...new Set(rows.map(sentenceOf))];
    const quoted = n => quote(rows.filter(row => sentenceOf(row) === n));
    return sentences.map(n => `${quoted(n)} in sentence ${n}`).join('; ');
  }

  function aboutWord(word) {
    const count = words.filter(w => w === word).length;
    return `“${word}” occurs ${count === 1 ? 'once' : `${count} times`}.`;
  }

  function aboutBars() {
    const count = lastSeeds(state).length;
    return `The bars are the mean of ${count === 1 ? 'this mask' : `the last ${count} masks`}.`;
  }

  function draw() {
    const p = data.ps[state.p];
    pValue.textContent = p.toFixed(1);
    slider.setAttribute('aria-valuetext', `p = ${p.toFixed(1)}`);
    drawn.forEach(({svg, title, rows}, i) => {
      title.textContent = TITLES[kinds()[i]];
      svg.setAttribute('aria-label', `Mask: ${title.textContent}`);
      rows.forEach(({cells}, row) => cells.forEach((cell, column) => {
        const kept = isKept(data, kinds()[i], state, row, column);
        cell.setAttribute('class', kept ? 'kept' : 'dropped');
      }));
    });
    const scale = p < 1 ? 1 / (1 - p) : 0;
    words.forEach((_, row) => {
      const mean = meanKept(data, kinds()[0], state, row);
      bar(bars[row].scaled, mean * scale);
      bar(bars[row].plain, mean);
    });
    means.setAttribute('aria-label', `Mean factor of each word over ${lastSeeds(state).length} masks`);
    describe();
  }

  // A factor of 2 fills the strip; a single mask at a high p reaches further and is cut there.
  function bar(rect, value) {
    const high = Math.min(value, 2.2) / 2 * HIGH;
    rect.setAttribute('height', high);
    rect.setAttribute('y', HIGH + 22 - high);
    rect.setAttribute('data-value', value.toFixed(4));
  }

  function next(n) {
    state.drawn += n;
    state.seed = (state.drawn - 1) % 100;
    draw();
  }

  slider.addEventListener('input', () => { state.p = +slider.value; draw(); });
  newMask.addEventListener('click', () => next(1));
  hundred.addEventListener('click', () => next(100));
  sequence.addEventListener('change', () => { state.perSequence = sequence.checked; draw(); });
  draw();
}
