// The routes of openapi.json, with their schemas.
const add = (parent, name, text) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};
const found = await (await fetch("openapi.json")).json();
const main = document.getElementById("routes");
for (const [path, methods] of Object.entries(found.paths)) {
  for (const method of ["get", "post"].filter((name) => name in methods)) {
    const route = methods[method];
    add(main, "h2", `${method.toUpperCase()} ${path}`);
    add(main, "p", route.summary);
    const content = route.requestBody?.content["application/json"];
    if (content) schema(content.schema.$ref, "body");
    for (const [status, answer] of Object.entries(route.responses)) {
      add(main, "p", `${status}: ${answer.description}`);
    }
    const answer = route.responses["200"].content["application/json"];
    if (answer) schema(answer.schema.$ref, "answer");
  }
}

function schema(reference, kind) {
  const name = reference.split("/").at(-1);
  const part = add(main, "details");
  add(part, "summary", `${kind}: ${name}`);
  add(part, "pre", JSON.stringify(found.components.schemas[name], null, 2));
}
