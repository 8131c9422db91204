/*
 * A plugin of QEMU's TCG: counts the instructions executed at each address, in the emulated host and
 * in the guests inside it alike, and writes them at the end. Arguments: out=FILE.
 *
 * QEMU's package has no header for plugins; these are the few functions of its stable interface, version 1.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*translated)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int add_u64, void *counter, uint64_t count);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*ended)(plugin_id, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);

int qemu_plugin_version = 1;

/* Blocks by address and length; a power of two, some ten times what a few boots use. */
#define SLOTS (1u << 21)
static struct block {
	uint64_t address, length, executed;
} *blocks;
static const char *out;

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
	uint64_t address = qemu_plugin_tb_vaddr(tb), length = qemu_plugin_tb_n_insns(tb);
	uint64_t at = (address * 0x9e3779b97f4a7c15u + length) >> 43;

	(void)id;
	while (blocks[at].length && (blocks[at].address != address || blocks[at].length != length))
		at = (at + 1) % SLOTS;
	blocks[at].address = address;
	blocks[at].length = length;
	qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &blocks[at].executed, length);
}

static void ended(plugin_id id, void *data)
{
	FILE *file = fopen(out, "w");

	(void)id, (void)data;
	if (!file) {
		perror(out);
		return;
	}
	for (size_t i = 0; i < SLOTS; i++)
		if (blocks[i].executed)
			fprintf(file, "%lx %lu\n", blocks[i].address, blocks[i].executed);
	fclose(file);
}

int qemu_plugin_install(plugin_id id, const void *machine, int argc, char **argv)
{
	(void)machine;
	blocks = calloc(SLOTS, sizeof(*blocks));
	if (!blocks || argc != 1 || strncmp(argv[0], "out=", 4))
		return -1;
	out = strdup(argv[0] + 4);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, 0);
	return 0;
}
