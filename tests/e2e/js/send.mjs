// Sends one trace of two services to the URL given first, as JSON, protobuf or over gRPC (json | proto
// | grpc), with gzip if a third argument says so. Prints {"trace_id", "span_ids"}; exits with 1 if the export fails.
import { context, SpanKind, SpanStatusCode, trace } from '@opentelemetry/api';
import { OTLPTraceExporter as GrpcExporter } from '@opentelemetry/exporter-trace-otlp-grpc';
import { OTLPTraceExporter as JsonExporter } from '@opentelemetry/exporter-trace-otlp-http';
import { OTLPTraceExporter as ProtoExporter } from '@opentelemetry/exporter-trace-otlp-proto';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { BasicTracerProvider, BatchSpanProcessor } from '@opentelemetry/sdk-trace-base';
import { W3CTraceContextPropagator } from '@opentelemetry/core';

const [url, kind, compression] = process.argv.slice(2);
const Exporter = { json: JsonExporter, proto: ProtoExporter, grpc: GrpcExporter }[kind];

function service(name) {
  const exporter = new Exporter({ url, ...(compression ? { compression } : {}) });
  const send = exporter.export.bind(exporter);
  exporter.export = (spans, done) =>
    send(spans, (result) => {
      if (result.code !== 0) {
        console.error(result.error);
        process.exitCode = 1;
      }
      done(result);
    });
  return new BasicTracerProvider({
    resource: resourceFromAttributes({ 'service.name': name }),
    spanProcessors: [new BatchSpanProcessor(exporter)],
  });
}

const propagator = new W3CTraceContextPropagator();
const shop = service('shop');
const bank = service('bank');

const order = shop.getTracer('shop').startSpan('checkout', {
  kind: SpanKind.SERVER,
  attributes: { customer: 'Zoë', 'big.number': 9007199254740991, items: ['a', 'b'] },
});
const headers = {};
propagator.inject(trace.setSpan(context.active(), order), headers, {
  set: (carrier, key, value) => (carrier[key] = value),
});
const arrived = propagator.extract(context.active(), headers, {
  get: (carrier, key) => carrier[key],
  keys: (carrier) => Object.keys(carrier),
});
const payment = bank.getTracer('bank').startSpan(
  'payment.charge_card',
  { kind: SpanKind.SERVER, attributes: { amount: 1250.5, currency: 'EUR', retried: false } },
  arrived,
);
payment.addEvent('declined', { code: 51 });
payment.setStatus({ code: SpanStatusCode.ERROR, message: 'declined' });
payment.end();
order.end();

await Promise.all([shop.shutdown(), bank.shutdown()]);
const { traceId, spanId } = order.spanContext();
console.log(JSON.stringify({ trace_id: traceId, span_ids: [spanId, payment.spanContext().spanId] }));
