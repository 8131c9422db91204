/* Says with whose power it runs. Its file belongs to root and is set-user-ID. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}
