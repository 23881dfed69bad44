"use strict";
// A fresh Idempotency-Key for each "Try it out": the field starts with an example that works once.
window.ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#api",
  validatorUrl: null,
  deepLinking: true,
  tryItOutEnabled: false,
  requestSnippetsEnabled: true,
});
