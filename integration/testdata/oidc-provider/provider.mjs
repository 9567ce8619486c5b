// An identity provider that Sallyport's authors did not write (npm oidc-provider,
// a certified OpenID Provider) with its own login and consent pages, on a port of
// the kernel's choice. It prints `ready {"issuer": …}` and then obeys lines of
// JSON on standard input, answering each with `done`:
//
//   {"client": {…}}              registers a client (RFC 7591 metadata)
//   {"people": {"login": {…}}}   says who can log in, with which claims
//   {"rotate": true}             signs with a new key from now on, forgets the old
//
// It ends with its standard input.
import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';

// Where it is not told otherwise, the provider logs to standard output.
console.info = console.warn = console.log = (...line) => console.error(...line);
const say = (line) => process.stdout.write(`${line}\n`);

const { Provider } = await import('oidc-provider');

let people = {};
const clients = [];
let provider;

// rotate makes a provider with a key of its own; the port and the clients stay.
async function rotate() {
  const key = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey.export({ format: 'jwk' });
  const next = new Provider(issuer, {
    jwks: { keys: [{ ...key, use: 'sig', alg: 'RS256' }] },
    cookies: { keys: [randomBytes(32).toString('hex')] },
    scopes: ['openid', 'profile', 'email', 'teams'],
    claims: { openid: ['sub'], profile: ['name'], email: ['email', 'email_verified'], teams: ['teams'] },
    pkce: { required: () => true },
    findAccount: (_, id) => people[id] && { accountId: id, claims: () => ({ sub: id, ...people[id] }) },
  });
  for (const client of clients) await next.Client.adapter.upsert(client.client_id, client);
  next.on('server_error', (_, err) => console.error(err));
  provider = next.callback();
}

async function obey({ client, people: known, rotate: again }) {
  if (client) {
    clients.push(client);
    await rotate();
  }
  if (known) people = known;
  if (again) await rotate();
}

const server = createServer((req, res) => provider(req, res));
await new Promise((listening) => server.listen(0, '127.0.0.1', listening));
const issuer = `http://127.0.0.1:${server.address().port}`;
await rotate();
say(`ready ${JSON.stringify({ issuer })}`);
for await (const line of createInterface({ input: process.stdin })) {
  await obey(JSON.parse(line));
  say('done');
}
process.exit(0);
