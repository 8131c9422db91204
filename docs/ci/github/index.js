// Container hooks for GitHub's runner: one microVM for each job that names a container.
//
//   ACTIONS_RUNNER_CONTAINER_HOOKS=/usr/local/share/casemate/ci/github/index.js
//
// The runner starts this with the Node.js that it brings, once for each hook, with the hook's JSON on standard input.
// It takes shell scripts too, but looks for their shell in a PATH that the job can add to: they would run
// what the job put there, on the host.
'use strict'

const { spawn } = require('child_process')
const crypto = require('crypto')
const fs = require('fs')
const os = require('os')
const path = require('path')

// The job could have added to ours.
process.env.PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

const env = process.env
const casemateJob = path.join(__dirname, '..', 'casemate-job')
// The same for all jobs of this runner, which come one after the other; and not out of the hook's `state`: that passes
// through a directory that the job can write to.
const job = 'github-' + crypto.createHash('sha256').update(required('RUNNER_TEMP')).digest('hex').slice(0, 12)
const failed = path.join(os.tmpdir(), `casemate-${job}.failed`)
const noFollow = fs.constants.O_WRONLY | fs.constants.O_TRUNC | fs.constants.O_NOFOLLOW

const hooks = {
  prepare_job: prepareJob,
  run_script_step: runScriptStep,
  run_container_step: runContainerStep,
  cleanup_job: cleanupJob
}

main().catch(error => {
  console.error(`casemate: ${error.message}`)
  process.exitCode = 1
})

async function main () {
  const input = JSON.parse(fs.readFileSync(0, 'utf8'))
  const hook = Object.hasOwn(hooks, input.command) ? hooks[input.command] : undefined
  if (!hook) throw new Error(`the hook ${JSON.stringify(input.command)} is not known`)
  await hook(input.args ?? {}, input.state ?? {}, input.responseFile)
}

async function prepareJob ({ container, services }, _state, responseFile) {
  if (!container) throw new Error('this runner runs jobs in containers only: give the job a `container`')
  if (services?.length) throw new Error('this runner has no service containers')
  check(container)
  const repository = required('GITHUB_REPOSITORY_ID')
  fs.rmSync(failed, { force: true })
  // A runner that was killed leaves it. If it can't be removed, the step that wants its name will say so.
  await run(casemateJob, ['end', `${job}-step`]).catch(() => {})
  // A job's variables may be secret, and arguments are no place for secrets: they go with each step.
  const options = ['--workdir', container.workingDirectory, ...mounts(container)]
  await withLogin(container.registry, () =>
    run(casemateJob, ['start', job, `github-${repository}`, env.CASEMATE_CI_SECONDS || '21600', container.image, ...options]))
  const isAlpine = await run(casemateJob, ['exec', job, 'test', '-e', '/etc/alpine-release'], { codes: [0, 1] }) === 0
  const response = { isAlpine, state: { env: container.environmentVariables ?? {} }, context: { container: { id: job } } }
  const file = fs.openSync(responseFile, noFollow)
  fs.writeSync(file, JSON.stringify(response))
  fs.closeSync(file)
}

async function runScriptStep (args, state) {
  const variables = { ...state.env, ...args.environmentVariables }
  const words = Object.entries(variables).map(([name, value]) => quote(`${name}=${value}`))
  const command = [args.entryPoint, ...args.entryPointArgs ?? []].map(quote)
  const prepend = (args.prependPath ?? []).map(directory => `${directory}:`).join('')
  const script = [
    `cd -- ${quote(args.workingDirectory)} || exit`,
    `export PATH=${quote(prepend)}"$PATH"`,
    `exec env -- ${words.join(' ')} ${command.join(' ')} < /dev/null`
  ].join('\n')
  await step(() => run(casemateJob, ['exec', job, 'sh'], { input: script }))
}

// A container action gets a VM of its own beside the job's, with the same directories.
async function runContainerStep (args) {
  if (!args.image) throw new Error(`this runner builds no images, and the action wants one of ${args.dockerfile}`)
  check(args)
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'casemate-'))
  try {
    const file = path.join(directory, 'env')
    fs.writeFileSync(file, variables(args.environmentVariables ?? {}), { mode: 0o600 })
    const options = ['--rm', '--name', `${job}-step`, '--label', `casemate.ci.job=${job}-step`, '--env-file', file,
      ...(env.CASEMATE_CI_OPTIONS ?? '').split(/\s+/).filter(Boolean), ...mounts(args)]
    if (args.workingDirectory) options.push('--workdir', args.workingDirectory)
    if (args.entryPoint) options.push('--entrypoint', args.entryPoint)
    await step(() => withLogin(args.registry, () =>
      run(env.CASEMATE || 'casemate', ['run', ...options, '--', args.image, ...args.entryPointArgs ?? []])))
  } finally {
    fs.rmSync(directory, { recursive: true, force: true })
  }
}

async function cleanupJob () {
  const directory = env.CASEMATE_CI_ARTIFACTS
  let problem
  try {
    if (directory) {
      const name = ['REPOSITORY_ID', 'RUN_ID', 'RUN_ATTEMPT', 'JOB'].map(key => env[`GITHUB_${key}`]?.replace(/[^\w-]/g, '_')).join('-')
      // Jobs of a matrix have one name.
      await run(casemateJob, ['fetch', job, path.join(directory, `${name}-${crypto.randomUUID().slice(0, 8)}`)])
    }
  } catch (error) {
    problem = error
  }
  // Only what was pushed to a protected branch; on `pull_request_target` the branch is protected and the content may be anyone's.
  const trusted = env.GITHUB_REF_PROTECTED === 'true' && env.GITHUB_REF_TYPE === 'branch' && env.GITHUB_EVENT_NAME === 'push'
  const keep = trusted && !problem && !fs.existsSync(failed)
  // The second whatever becomes of the first.
  for (const end of [[`${job}-step`], [job, ...(keep ? ['keep'] : [])]]) {
    await run(casemateJob, ['end', ...end]).catch(error => { problem ??= error })
  }
  fs.rmSync(failed, { force: true })
  if (problem) throw problem
}

// The mark is there before the step begins, so that one which is killed counts as failed.
async function step (action) {
  const before = fs.existsSync(failed)
  fs.writeFileSync(failed, '')
  await action()
  if (!before) fs.rmSync(failed, { force: true })
}

// What a workflow's author may ask of Docker would reach beyond the job's VM.
function check (container) {
  const wishes = { options: container.createOptions, ports: container.portMappings, volumes: container.userMountVolumes }
  for (const [what, value] of Object.entries(wishes)) {
    if (value?.length) throw new Error(`this runner takes no \`${what}\` of containers: ${JSON.stringify(value)}`)
  }
}

// The runner's own directories. Those that lie within another one of them are there already; Docker's socket is not.
function mounts (container) {
  const all = (container.systemMountVolumes ?? []).filter(mount => !mount.targetVolumePath.endsWith('/docker.sock'))
  const within = (inner, outer) => inner !== outer && inner.readOnly === outer.readOnly &&
    inner.targetVolumePath.startsWith(`${outer.targetVolumePath}/`) &&
    inner.sourceVolumePath === outer.sourceVolumePath + inner.targetVolumePath.slice(outer.targetVolumePath.length)
  return all.filter(mount => !all.some(other => within(mount, other))).flatMap(mount => {
    const fields = ['type=bind', `source=${mount.sourceVolumePath}`, `target=${mount.targetVolumePath}`]
    if (mount.readOnly) fields.push('readonly')
    return ['--mount', fields.map(field => `"${field.replaceAll('"', '""')}"`).join(',')]
  })
}

// The lines of an environment file, which can't hold more than lines.
function variables (map) {
  return Object.entries(map).map(([name, value]) => {
    if (/[\r\n]/.test(name + value)) {
      throw new Error(`the variable ${JSON.stringify(name)} has several lines, which container actions can't get here`)
    }
    return `${name}=${value}\n`
  }).join('')
}

// Does something while casemate knows the registry's password.
async function withLogin (registry, action) {
  if (!registry?.username) return action()
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'casemate-'))
  try {
    const auth = Buffer.from(`${registry.username}:${registry.password}`).toString('base64')
    const server = registry.serverUrl || 'https://index.docker.io/v1/'
    fs.writeFileSync(path.join(directory, 'config.json'), JSON.stringify({ auths: { [server]: { auth } } }), { mode: 0o600 })
    env.DOCKER_CONFIG = directory
    return await action()
  } finally {
    delete env.DOCKER_CONFIG
    fs.rmSync(directory, { recursive: true, force: true })
  }
}

// Runs a program to its end in a process group of its own. The runner ends a hook with SIGINT, then SIGTERM.
function run (program, args, { input = '', codes = [0] } = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ['pipe', 'inherit', 'inherit'], detached: true })
    const stop = () => { try { process.kill(-child.pid, 'SIGTERM') } catch { /* it has ended */ } }
    for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, stop)
    const over = () => { for (const signal of ['SIGINT', 'SIGTERM']) process.off(signal, stop) }
    child.on('error', error => { over(); reject(error) })
    child.on('close', (code, signal) => {
      over()
      if (codes.includes(code)) resolve(code)
      else reject(new Error(`${path.basename(program)} ${args[0]} ended with ${signal ?? `exit code ${code}`}`))
    })
    // One that ends early doesn't read it all; its exit code says more.
    child.stdin.on('error', () => {})
    child.stdin.end(input)
  })
}

function quote (text) {
  return `'${String(text).replaceAll("'", "'\\''")}'`
}

function required (name) {
  if (!env[name]) throw new Error(`${name} is not set: only GitHub's runner can start this`)
  return env[name]
}
