// A page's spans, sent to the URL after the question mark; the page then says "sent <trace id>".
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { BatchSpanProcessor, WebTracerProvider } from '@opentelemetry/sdk-trace-web';

const exporter = new OTLPTraceExporter({ url: location.search.slice(1) });
const send = exporter.export.bind(exporter);
let failed = false;
exporter.export = (spans, done) =>
  send(spans, (result) => {
    failed ||= result.code !== 0;
    done(result);
  });
const provider = new WebTracerProvider({
  resource: resourceFromAttributes({ 'service.name': 'page' }),
  spanProcessors: [new BatchSpanProcessor(exporter)],
});
const span = provider.getTracer('page').startSpan('payment.charge_card', {
  attributes: { amount: 1250.5 },
});
span.end();
provider
  .forceFlush()
  .catch(() => (failed = true))
  .then(() => {
    const said = failed ? 'failed' : `sent ${span.spanContext().traceId}`;
    document.getElementById('said').textContent = said;
  });
