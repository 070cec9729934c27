// The explorer's page: plain controls, a canvas, and messages to the kernel (nofa_nb.apps.explorer_app). Fetches nothing.
const PART = 4 * 2 ** 20, PATIENCE = 3000 // bytes of an upload's part; milliseconds without an answer before the kernel is asked whether it lives
const RELOAD = "In a notebook run the cell again; in the app reload this page."
const SILENT = `No answer from the kernel: it is busy with another cell, was restarted, or has stopped. If it stays silent: ${RELOAD.toLowerCase()}`
const GONE = `The kernel does not answer: it was restarted or has stopped. ${RELOAD}`
const NAMES = { image: "picture", depth: "depth", normals: "normals", weights: "W-Net weights", offsets: "offsets" }
const RAMPS = { depth: ["#fde725", "#5ec962", "#21918c", "#3b528b", "#440154"], other: ["#000004", "#51127c", "#b73779", "#fc8961", "#fcfdbf"] }

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value)
    else if (value === true) node.setAttribute(name, "")
    else if (value !== false && value != null) node.setAttribute(name, value)
  }
  node.append(...children)
  return node
}

let count = 0
const fresh = (name) => `nofa-${name}-${++count}`

function slider(name, low, high, value, step, changed, kind = "") {
  const id = fresh("slider"), digits = step < 0.1 ? 2 : step < 1 ? 1 : 0
  const input = make("input", { type: "range", id, min: low, max: high, step, value, "data-name": name })
  const shown = make("output", { for: id })
  const row = make("div", { class: `slider ${kind}` }, make("label", { for: id, title: name }, name), input, shown)
  const show = () => {
    shown.textContent = Number(input.value).toFixed(digits)
    row.classList.toggle("set", Math.abs(input.value - value) > 1e-9)
  }
  input.addEventListener("input", (event) => { show(); changed(event) })
  input.addEventListener("dblclick", (event) => { input.value = value; show(); changed(event) })
  show()
  return { row, input, name, get: () => Number(input.value), set: (v) => { input.value = v; show() }, reset: () => { input.value = value; show() } }
}

function choices(title, options, changed) {
  const group = fresh("choice"), inputs = {}
  const box = make("span", { class: "choices" })
  for (const [value, text] of Object.entries(options)) {
    inputs[value] = make("input", { type: "radio", name: group, value, onchange: changed })
    box.append(make("label", {}, inputs[value], text))
  }
  Object.values(inputs)[0].checked = true
  const enable = (on, why = "", of = Object.keys(inputs)) => { for (const v of of) { inputs[v].disabled = !on; inputs[v].parentNode.title = on ? "" : why } }
  return { node: make("fieldset", {}, make("legend", {}, title), box), get: () => Object.keys(inputs).find((v) => inputs[v].checked),
           set: (v) => { inputs[v].checked = true }, inputs, enable }
}

function download(bytes, name) {
  const address = URL.createObjectURL(new Blob([bytes]))
  const link = make("a", { href: address, download: name, class: "hidden" })
  document.body.append(link)
  link.click()
  link.remove()
  setTimeout(() => URL.revokeObjectURL(address), 10000)
}

async function library(bytes) { // a script made for pages, as a module: it must not find a loader that wants to know of it
  const head = "const define = undefined, module = { exports: {} }, exports = module.exports;\n"
  const address = URL.createObjectURL(new Blob([head, bytes, "\nexport default module.exports"], { type: "text/javascript" }))
  try { return (await import(/* webpackIgnore: true */ address)).default } finally { URL.revokeObjectURL(address) }
}

function render({ model, el }) {
  const view = Math.random().toString(36).slice(2), setup = model.get("setup")
  const say = (kind, content = {}, buffers = []) => {
    try { model.send({ view, kind, ...content }, undefined, buffers) } catch (error) { lose(error) }
  }
  const root = make("section", { class: "nofa", "aria-label": "NOFA++ explorer", "data-lm-suppress-shortcuts": "true" })
  const measured = { paints: [], errors: [], sent: 0 } // for tests and for the measurement of the speed
  root.nofa = measured

  // --- asking for pictures: at most two requests on the way, the newest settings win
  let id = 0, answered = 0, dirty = false, since = null, face = null, playing = null, motion = null
  const started = new Map()
  const changed = (event) => {
    since ??= event?.timeStamp ?? performance.now()
    dirty = true
    if (gone && alert.hidden) complain(lost ? GONE : SILENT) // said again, as it was closed and is still so
    pump()
  }
  function scene() {
    return { beta: units.map((s) => s.get()), alpha: identity.map((s) => s.get()), yaw: yaw.get(), pitch: pitch.get(), zoom: 2 ** zoom.get(),
             layer: layer.get(), canonical: space.get() === "canonical", coarse: detail.get() === "coarse", by_code: driver.get() === "code",
             frame: playing ? playing.frame : null, head: head.checked }
  }
  function pump() {
    if (!dirty || !face || id - answered >= 2) return
    dirty = false
    started.set(++id, since ?? performance.now())
    since = null
    measured.sent++
    say("scene", { id, scene: scene() })
    watch()
    insist()
  }
  let insisting = null
  function insist() { // a request that got lost on the way is made again
    insisting ??= setTimeout(() => {
      insisting = null
      if (id > answered && !gone) { answered = id; dirty = true; pump() }
    }, 2 * PATIENCE)
  }
  function settle(number) {
    if (!number) return
    answered = Math.max(answered, number)
    for (const key of started.keys()) if (key < number - 4) started.delete(key)
    pump()
  }

  // --- is there a kernel?
  let heard = performance.now(), timer = null, gone = false, lost = false
  function lose(error) { // a notebook whose kernel was restarted takes no messages for the old one
    console.warn(error)
    gone = lost = true
    complain(GONE)
  }
  function watch(pinged = false) {
    if (timer || lost) return
    const at = performance.now()
    timer = setTimeout(() => {
      timer = null
      if (heard >= at) return
      if (pinged) { gone = true; complain(SILENT) } else { say("ping"); watch(true) }
    }, PATIENCE)
  }

  // --- the picture
  const canvas = make("canvas", { width: 8, height: 8, "aria-hidden": "true" })
  const working = make("span", { class: "working", role: "status", hidden: true })
  const ramp = make("i"), lowest = make("span"), meaning = make("span"), highest = make("span")
  const legend = make("div", { class: "legend", hidden: true }, ramp, make("div", {}, lowest, meaning, highest))
  const picture = make("div", { class: "picture", tabindex: 0, role: "application", "aria-roledescription": "picture to turn", "aria-label": "the face" }, canvas, legend, working)
  const painter = canvas.getContext("2d"), store = make("canvas")
  let waiting = null
  function paint() {
    if (!waiting) return
    const { said, bytes } = waiting
    waiting = null
    if (canvas.width !== said.width) { canvas.width = said.width; canvas.height = said.height }
    painter.putImageData(new ImageData(new Uint8ClampedArray(bytes.buffer, bytes.byteOffset, bytes.byteLength), said.width, said.height), 0, 0)
    canvas.dataset.id = said.id
    canvas.dataset.quality = said.quality
    legend.hidden = said.low === said.high
    if (!legend.hidden) {
      const colours = RAMPS[said.layer] ?? RAMPS.other
      ramp.style.background = `linear-gradient(to right, ${colours.join(",")})`
      lowest.textContent = (said.layer === "depth" ? said.high : said.low).toPrecision(2)
      highest.textContent = (said.layer === "depth" ? said.low : said.high).toPrecision(2)
      meaning.textContent = setup.layers[said.layer]
    }
    const from = started.get(said.id)
    setTimeout(() => { // after the browser has painted
      const now = performance.now()
      measured.paints.push({ id: said.id, quality: said.quality, at: now, waited: now - (from ?? now), seconds: said.seconds, width: said.width })
      if (measured.paints.length > 4000) measured.paints.splice(0, 2000)
      if (said.quality !== "still") pace(now, now - (from ?? now))
    }, 0)
  }
  let last = 0, smooth = 0
  function pace(now, waited) {
    const step = now - last
    last = now
    if (step > 500) { smooth = 0; return }
    smooth = smooth ? 0.9 * smooth + 0.1 * step : step
    speed.textContent = `${(1000 / smooth).toFixed(0)} pictures/s · ${waited.toFixed(0)} ms from hand to screen`
  }

  // --- orbit and zoom: drag, wheel, arrow keys
  let held = null
  picture.addEventListener("pointerdown", (e) => { held = [e.clientX, e.clientY]; picture.setPointerCapture(e.pointerId) })
  picture.addEventListener("pointerup", () => { held = null })
  picture.addEventListener("pointercancel", () => { held = null })
  picture.addEventListener("pointermove", (e) => {
    if (!held) return
    const scale = 120 / picture.clientWidth
    yaw.set(yaw.get() - (e.clientX - held[0]) * scale)
    pitch.set(pitch.get() + (e.clientY - held[1]) * scale)
    held = [e.clientX, e.clientY]
    changed(e)
  })
  picture.addEventListener("wheel", (e) => { e.preventDefault(); zoom.set(zoom.get() - e.deltaY / 600); changed(e) }, { passive: false })
  picture.addEventListener("keydown", (e) => {
    const moves = { ArrowLeft: [yaw, -5], ArrowRight: [yaw, 5], ArrowUp: [pitch, 5], ArrowDown: [pitch, -5], "+": [zoom, 0.1], "=": [zoom, 0.1], "-": [zoom, -0.1] }
    if (e.key === "0") lookAhead(e)
    else if (moves[e.key]) { const [s, by] = moves[e.key]; s.set(s.get() + by); changed(e) } else return
    e.preventDefault()
  })
  const yaw = slider("turn", -90, 90, 0, 1, (e) => changed(e), "view")
  const pitch = slider("tilt", -40, 40, 0, 1, (e) => changed(e), "view")
  const zoom = slider("zoom", -1, 2, 0, 0.05, (e) => changed(e), "view")
  const lookAhead = (event) => { for (const s of [yaw, pitch, zoom]) s.reset(); changed(event) }

  // --- what is shown
  const layer = choices("Show", Object.fromEntries(Object.keys(setup.layers).map((k) => [k, NAMES[k]])), (e) => changed(e))
  const space = choices("Space", { deformed: "deformed", canonical: "canonical" }, (e) => { allow(); changed(e) })
  const detail = choices("Volume", { fine: "fine", coarse: "coarse" }, (e) => changed(e))
  const driver = choices("Expression by", { deformation: "deformation", code: "prior's code" }, (e) => { allow(); changed(e) })
  function allow() { // offsets only where something is deformed
    const why = space.get() === "canonical" ? "the canonical face is not deformed" : face?.code && driver.get() === "code" ? "the prior draws this expression: nothing is deformed" : ""
    layer.enable(!why, why, ["offsets"])
    if (why && layer.get() === "offsets") layer.set("image")
  }

  // --- expression and identity
  const units = [], groups = []
  const list = make("div", { class: "scroll" })
  for (const [part, sliders] of Object.entries(setup.groups)) {
    const box = make("details", { open: groups.length === 0 }, make("summary", {}, part, make("small", {}, `${sliders.length}`)))
    const rows = sliders.map((s) => {
      const row = slider(s.name, s.low, s.high, 0, 0.01, (e) => { stop(); changed(e) })
      units[s.index] = row
      box.append(row.row)
      return row
    })
    groups.push({ box, rows })
    list.append(box)
  }
  const find = make("input", { type: "search", placeholder: "search, such as smile", "aria-label": "search expression units", oninput: search })
  function search() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean)
    for (const group of groups) {
      const { box, rows } = group
      let any = false
      for (const r of rows) { r.row.hidden = !words.every((w) => r.name.toLowerCase().includes(w)); any ||= !r.row.hidden }
      box.hidden = !any
      if (words.length) { group.was ??= box.open; box.open = any }
      else if (group.was != null) { box.open = group.was; group.was = null } // as it was before the search
    }
  }
  const neutral = (event) => { stop(); for (const s of units) s.reset(); changed(event) }
  const anyExpression = (event) => {
    stop()
    for (const s of units) s.set(Math.random() < 0.2 ? (Number(s.input.min) < 0 ? 2 * Math.random() - 1 : 0.8 * Math.random()) : 0)
    changed(event)
  }
  const identity = setup.identity.map((s) => slider(s.name, s.low, s.high, 0, 0.05, (e) => changed(e)))
  const sameFace = (event) => { for (const s of identity) s.reset(); changed(event) }
  const anyFace = (event) => { for (const s of identity) s.set(2 * (Math.random() + Math.random() + Math.random() - 1.5)); changed(event) }

  const onlyMoves = make("p", { class: "hint", hidden: true }, "Of a photo, or an avatar file, identity reaches only the deformation: it changes how this face moves, and nothing in canonical space.")

  // --- whose face
  const seed = make("input", { type: "number", min: 0, max: 2147483647, step: 1, value: 7, "aria-label": "seed of a face", onkeydown: (e) => { if (e.key === "Enter") bySeed() } })
  const bySeed = () => { busy("drawing the face …"); say("seed", { seed: Number(seed.value) }); watch() }
  const another = () => { seed.value = Math.floor(Math.random() * 100000); bySeed() }
  async function upload(input, what) {
    const file = input.files[0]
    input.value = ""
    if (!file) return
    if (file.size === 0) return complain(`${file.name} is empty`)
    if (file.size > setup.most) return complain(`${file.name} must be at most ${Math.floor(setup.most / 2 ** 20)} MB, got ${Math.ceil(file.size / 2 ** 20)} MB`)
    busy(`reading ${file.name} …`)
    const bytes = await file.arrayBuffer()
    for (let at = 0; at < bytes.byteLength; at += PART) {
      say("upload", { what, name: file.name, last: at + PART >= bytes.byteLength }, [bytes.slice(at, at + PART)])
    }
    watch()
  }
  const chooser = (text, what, accept) => {
    const input = make("input", { type: "file", accept, "aria-label": text, onchange: () => upload(input, what) })
    return make("span", { class: "file" }, text, input)
  }
  const thumbs = Object.fromEntries(setup.gallery.map((name) => [name, make("button", {
    type: "button", title: name, "aria-label": `photo: ${name}`, onclick: () => { busy(`reading ${name} …`); say("gallery", { name }); watch() } })]))

  // --- a motion
  const head = make("input", { type: "checkbox", checked: true, id: fresh("head"), onchange: (e) => changed(e) })
  const play = make("button", { type: "button", disabled: true, onclick: () => (playing ? stop() : start()) }, "Play")
  const NONE = "no motion loaded: a film walks around the face", motionName = make("span", { class: "who" }, NONE)
  const unload = make("button", { type: "button", hidden: true, onclick: () => { stop(); forget(); say("unload") } }, "Unload")
  function forget() {
    motion?.address && URL.revokeObjectURL(motion.address)
    motion = null
    motionName.textContent = NONE
    play.disabled = unload.hidden = true
  }
  const clip = make("input", { type: "number", min: 0, step: 1, value: 1, "aria-label": "seed of a clip of the world" })
  function start() {
    if (!motion) return
    playing = { began: performance.now(), frame: 0 }
    play.textContent = "Stop"
    if (motion.sound) { motion.sound.currentTime = 0; motion.sound.play().catch(() => {}) }
    requestAnimationFrame(advance)
  }
  function advance() {
    if (!playing) return
    const frame = Math.floor((performance.now() - playing.began) / 1000 * motion.fps)
    if (frame >= motion.frames) return stop()
    if (frame !== playing.frame || frame === 0) { playing.frame = frame; changed() }
    requestAnimationFrame(advance)
  }
  function stop() {
    if (!playing) return
    playing = null
    play.textContent = "Play"
    motion.sound?.pause()
    changed()
  }

  // --- figures
  const plot = make("div", { class: "plot", hidden: true, role: "figure" }), caption = make("p", { class: "caption" })
  const figures = { volume: "Volume and a ray", planes: "Tri-planes", weights: "W-Net's weights", walk: "Latent walk" }
  const DRAWING = "drawing …"
  let plotly = null, asked = null
  const figure = (name) => {
    for (const [key, b] of Object.entries(figureButtons)) b.setAttribute("aria-pressed", key === name)
    caption.textContent = DRAWING
    asked = name
    if (!plotly) { plotly = new Promise((resolve) => { plotlyArrived = resolve }); say("plotly") }
    say("figure", { name })
    watch()
  }
  function noFigure() { // what was asked for will not come
    if (caption.textContent !== DRAWING) return
    caption.textContent = ""
    for (const [key, b] of Object.entries(figureButtons)) b.setAttribute("aria-pressed", !plot.hidden && key === plot.dataset.name)
  }
  measured.figure = figure
  let plotlyArrived = () => {}, resize = () => {}
  const widths = new ResizeObserver(() => requestAnimationFrame(() => resize()))
  widths.observe(plot)
  const figureButtons = Object.fromEntries(Object.entries(figures).map(([name, text]) =>
    [name, make("button", { type: "button", "aria-pressed": "false", onclick: () => figure(name) }, text)]))
  async function drawFigure(said, bytes) {
    const Plotly = await plotly
    if (said.name !== asked) return
    const spec = JSON.parse(new TextDecoder().decode(bytes))
    plot.hidden = false
    plot.setAttribute("aria-label", `${figures[said.name]}: ${said.caption}`)
    resize = () => {}
    Plotly.purge(plot)
    const { ratio, around } = spec.layout.meta ?? {} // pictures fill the width: the height follows
    const size = () => ({ width: plot.clientWidth, height: ratio ? Math.round((plot.clientWidth - 12) / ratio) + around : spec.layout.height })
    await Plotly.newPlot(plot, spec.data, { ...spec.layout, ...size() }, { displaylogo: false })
    resize = () => { if (plot.clientWidth && plot.clientWidth !== plot.layout.width) Plotly.relayout(plot, size()) }
    nameTools()
    plot.on("plotly_afterplot", nameTools)
    if (spec.frames?.length) await Plotly.addFrames(plot, spec.frames)
    caption.textContent = said.caption
    plot.dataset.name = said.name
  }

  function nameTools() { // plotly's buttons are links without words
    for (const a of plot.querySelectorAll("a.modebar-btn")) { a.setAttribute("role", "button"); a.setAttribute("aria-label", a.dataset.title ?? "plot tool") }
  }

  // --- what the page says
  const who = make("span", { class: "who" }), speed = make("span", { class: "speed", "aria-hidden": "true" })
  const notes = make("p", { class: "note", hidden: true }), sentence = make("span")
  const alert = make("div", { class: "alert", role: "alert", hidden: true }, sentence,
    make("button", { type: "button", "aria-label": "close the message", onclick: () => { alert.hidden = true } }, "×"))
  function complain(text) {
    sentence.textContent = text
    alert.hidden = false
    busy("")
    measured.errors.push(text)
    alert.scrollIntoView({ block: "nearest" }) // nothing happens where it can be seen
  }
  function busy(text) { working.textContent = text; working.hidden = !text; if (text) alert.hidden = true }
  const button = (text, action, attributes = {}) => make("button", { type: "button", onclick: action, ...attributes }, text)
  const save = (what, text) => button(text, () => { busy(`${what} …`); say("save", { what }); watch() })

  function showFace(said) {
    face = said
    stop()
    for (const s of [...units, ...identity, yaw, pitch, zoom]) s.reset()
    said.beta.forEach((v, i) => units[i]?.set(v))
    who.textContent = said.code ? `${said.name}, a face of the prior` : said.name
    const all = [...setup.notes, ...said.notes]
    notes.textContent = all.join(" ")
    notes.hidden = !all.length
    driver.node.hidden = !said.code
    driver.set(said.code && !setup.trained ? "code" : "deformation")
    onlyMoves.hidden = said.code
    allow()
    detail.enable(said.detail, "a face of the prior has no photo whose details could be added")
    if (!said.detail) detail.set("fine")
    picture.setAttribute("aria-label", `face of ${said.name}; arrow keys turn it, plus and minus zoom, 0 looks from the front`)
    busy("")
    answered = id
    dirty = true
    pump()
  }

  function answer(said, buffers) {
    if (said.view !== view) return
    heard = performance.now()
    if (gone) { gone = false; alert.hidden = true }
    const bytes = buffers?.[0] && new Uint8Array(buffers[0].buffer, buffers[0].byteOffset, buffers[0].byteLength)
    if (said.kind === "frame") {
      measured.last = said
      if (said.id < answered) return
      if (!waiting) { requestAnimationFrame(paint); setTimeout(paint, 250) } // a tab in the background gets no animation frames
      waiting = { said, bytes }
      settle(said.id)
    } else if (said.kind === "face") showFace(said)
    else if (said.kind === "error") { complain(said.sentence); noFigure(); settle(said.id ?? id) }
    else if (said.kind === "thumbnail") thumbs[said.name].replaceChildren(make("img", { src: said.address, alt: "" }))
    else if (said.kind === "motion") {
      stop()
      forget()
      const address = bytes && URL.createObjectURL(new Blob([bytes], { type: "audio/wav" }))
      motion = { frames: said.frames, fps: said.fps, address, sound: address && new Audio(address) }
      motionName.textContent = `${said.name}, ${(said.frames / said.fps).toFixed(1)} s`
      play.disabled = unload.hidden = false
      busy("")
      start()
    } else if (said.kind === "progress") busy(`film: ${said.done} of ${said.of} pictures`)
    else if (said.kind === "file") { busy(""); download(bytes, said.name); measured.file = { name: said.name, size: bytes.byteLength } }
    else if (said.kind === "plotly") plotlyArrived(library(bytes))
    else if (said.kind === "figure") drawFigure(said, bytes).catch((e) => { complain(`the figure cannot be drawn: ${e.message}`); noFigure() })
  }
  model.on("msg:custom", answer)

  // --- put together
  const card = (title, tools, ...rest) => make("div", { class: "card" }, make("div", { class: "head" }, make("h3", {}, title), ...tools), ...rest)
  root.append(
    make("header", {}, make("h2", {}, "NOFA++ explorer"), who, speed), notes,
    make("div", { class: "columns" },
      make("div", {},
        make("div", { class: "card stage" }, make("div", { class: "over" }, alert), picture,
          make("div", { class: "row" }, yaw.row, pitch.row, zoom.row, button("Reset view", lookAhead)),
          make("div", { class: "row" }, layer.node, space.node, detail.node, driver.node),
          make("div", { class: "row" }, chooser("Open motion …", "motion", ".safetensors"), button("Clip of the world", () => { busy("making the clip …"); say("clip", { seed: Number(clip.value) }); watch() }),
            clip, play, unload, make("span", {}, head, make("label", { for: head.id }, " with its head")), motionName),
          make("div", { class: "row" }, save("picture", "Save picture"), save("film", "Save film"), save("avatar", "Save avatar")),
          make("p", { class: "hint" }, "Picture: drag or arrow keys turn it, wheel or + and - zoom, 0 looks from the front. Keys: / searches, r random expression, n neutral, p plays or stops the motion. A double click on a slider resets it.")),
        make("div", { class: "card" }, make("div", { class: "head", style: "margin-bottom:0" }, make("h3", {}, "Look inside"), ...Object.values(figureButtons)), caption, plot)),
      make("aside", {},
        card("Face", [], make("div", { class: "row", style: "margin-top:0" }, seed, button("Show seed", bySeed), button("Another", another)),
          make("div", { class: "row" }, chooser("Photo …", "photo", "image/*"), chooser("Avatar file …", "avatar", ".safetensors")),
          make("div", { class: "thumbs", role: "group", "aria-label": "gallery of photos" }, ...Object.values(thumbs))),
        card("Expression", [button("Random", anyExpression), button("Reset", neutral)], make("div", { class: "row", style: "margin-top:0" }, find), list),
        card("Identity", [button("Random", anyFace, { "aria-label": "random identity" }), button("Reset", sameFace, { "aria-label": "reset identity" })],
          onlyMoves, make("div", { class: "scroll", style: "max-height:230px" }, ...identity.map((s) => s.row))))))
  root.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || ["search", "number", "file"].includes(e.target.type)) return
    const keys = { "/": () => find.focus(), r: anyExpression, n: neutral, p: () => play.click() }
    if (keys[e.key]) { e.preventDefault(); keys[e.key](e) }
  })
  el.append(root)
  busy("loading …")
  say("hello")
  watch()
  return () => {
    stop()
    clearTimeout(timer)
    clearTimeout(insisting)
    model.off("msg:custom", answer)
    widths.disconnect()
    if (plotly) plotly.then((Plotly) => Plotly.purge(plot))
  }
}

export default { render }
